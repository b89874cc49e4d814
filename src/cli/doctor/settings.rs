//! The settings, the policy, and the files that they name. No network.

use super::finding::Finding;
use crate::app::accounts;
use crate::config::{ConfigError, Loaded, PolicySource, Transport};
use crate::job::Scarce;

/// Settings that nothing else can be told from.
pub(super) fn unreadable(error: &ConfigError) -> Vec<Finding> {
    let rest = "everything else is looked at once the settings can be read";
    vec![of("settings", error), Finding::skipped("everything else", "needs_settings", rest)]
}

pub(super) fn check(loaded: &Loaded) -> Vec<Finding> {
    let file = loaded.file();
    let read = if file.exists() {
        format!("{} is read", file.display())
    } else {
        format!("there is no {}; the environment says it all", file.display())
    };
    let mut found = vec![Finding::ok("settings", read)];
    found.extend(incomplete(loaded).iter().map(|error| of("settings", error)));
    if tracing_subscriber::EnvFilter::try_new(&loaded.settings.log.filter).is_err() {
        let advice = "expected a filter such as info or info,keyferry=debug";
        found.push(Finding::failed("settings", "setting_wrong", "the setting log.filter is wrong", advice));
    }
    found.extend(policy(loaded));
    found.extend(quota(loaded));
    found.extend(files(loaded));
    found
}

/// What AWS is thought to allow, and what may be meant otherwise.
fn quota(loaded: &Loaded) -> Vec<Finding> {
    let held = match loaded.rates() {
        Ok(held) => held,
        Err(error) => return vec![of("quota", &error)],
    };
    let rates: Vec<String> = Scarce::ALL
        .iter()
        .map(|operation| {
            let rate = match held.pace("", "", *operation) {
                Some(pace) => format!("{:.3}/s", 1_000.0 / pace.interval_ms),
                None => "not limited".into(),
            };
            format!("{} {rate}", operation.as_str())
        })
        .collect();
    let others = match (loaded.settings.quota.overrides.len(), held.places()) {
        (0, 0) => String::new(),
        (own, 0) => format!("; {own} accounts or Regions have rates of their own"),
        (own, told) => format!("; {own} accounts or Regions have rates of their own, {told} those of Service Quotas"),
    };
    let told = format!("for each account and Region, of what is not kept free: {}{others}", rates.join(", "));
    let advice = "aws service-quotas list-service-quotas --service-code kms shows what AWS allows";
    let warned = held.warnings().iter().map(|text| Finding::warning("quota", "quota_odd", text, advice));
    [Finding::ok("quota", told)].into_iter().chain(warned).collect()
}

/// What a worker needs and nobody wrote, all of it at once.
fn incomplete(loaded: &Loaded) -> Vec<ConfigError> {
    let settings = &loaded.settings;
    let events = match settings.events_to {
        Transport::RabbitMq => loaded.amqp_url(),
        Transport::Sqs => loaded.sqs_events_url(),
    };
    let requests = settings.requests_from.iter().map(|transport| match transport {
        // Told once, where events go the same way.
        Transport::RabbitMq if settings.events_to == Transport::RabbitMq => Ok(()),
        Transport::RabbitMq => loaded.amqp_url().map(drop),
        Transport::Sqs => loaded.sqs_requests_urls().map(drop),
    });
    [loaded.database_url().map(drop), accounts(loaded).map(drop), events.map(drop)]
        .into_iter()
        .chain(requests)
        .filter_map(Result::err)
        .collect()
}

fn policy(loaded: &Loaded) -> Vec<Finding> {
    let source = match loaded.policy_source() {
        Ok(source) => source,
        Err(error) => return vec![of("policy", &error)],
    };
    let policy = match source.read() {
        Ok(policy) => policy,
        Err(error @ ConfigError::File { .. }) => return vec![of("policy", &error)],
        Err(error) => {
            let advice = "mend the file; keyferry policy check says whether it is good";
            return vec![Finding::failed("policy", "policy_broken", error.to_string(), advice)];
        }
    };
    let mut found = vec![Finding::ok(
        "policy",
        match &source {
            PolicySource::AllowAll => {
                "allow-all: whoever can write to the queue of requests may ask for everything".into()
            }
            PolicySource::File(path) => format!("{} is good; keyferry policy show tells it in words", path.display()),
        },
    )];
    let warning = |warning: &str| Finding::warning("policy", "policy_warning", warning, "see keyferry policy show");
    found.extend(policy.warnings().iter().map(|text| warning(text)));
    for transport in &loaded.settings.requests_from {
        match loaded.proof(*transport, &policy) {
            Ok(proof) => found.extend(policy.unproved(transport.as_str(), &proof).iter().map(|text| warning(text))),
            Err(error) => found.push(of("policy", &error)),
        }
    }
    found
}

/// Secrets that others can read. The sentences say what to do.
fn files(loaded: &Loaded) -> Vec<Finding> {
    let warnings: Vec<String> = [loaded.kek_file_warning(), loaded.settings_file_warning()]
        .into_iter()
        .flatten()
        .chain(loaded.rabbitmq_file_warnings())
        .chain(loaded.dsm_key_file_warnings())
        .chain(loaded.target_file_warnings())
        .collect();
    if warnings.is_empty() {
        return vec![Finding::ok("files", "no file with a secret is open to others than its owner")];
    }
    warnings.iter().map(|text| Finding::warning("files", "file_open_to_others", text, "chmod 600 FILE")).collect()
}

/// A setting's fault, with where it is mended.
pub(super) fn of(check: &str, error: &ConfigError) -> Finding {
    let (code, advice) = match error {
        ConfigError::Missing { .. } => ("setting_missing", "keyferry init writes a file with every setting"),
        ConfigError::NoFile(_) => ("settings_no_file", "keyferry init writes one"),
        ConfigError::Unreadable(_) | ConfigError::Syntax { .. } => {
            ("settings_unreadable", "mend the line; keyferry config check reads it again")
        }
        ConfigError::Target { fault, .. } => (fault.code(), "mend it; keyferry config check reads it again"),
        ConfigError::Invalid { .. } => ("setting_wrong", "mend it; keyferry config check reads it again"),
        ConfigError::Quota { code, .. } => (*code, "mend it; keyferry config check reads it again"),
        ConfigError::File { .. } => {
            ("file_unreadable", "name the right file, or let the worker's user read it; ls -l FILE")
        }
        ConfigError::Unusable { .. } => ("file_wrong", "mend the file, or name the right one"),
    };
    Finding::failed(check, code, error.to_string(), advice)
}
