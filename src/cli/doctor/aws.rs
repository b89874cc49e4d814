//! AWS KMS, for each target: the role or whose the credentials are, the right to look at a key, the clock. Harmless calls.

use super::database::Seen;
use super::finding::Finding;
use super::{clock, within};
use crate::app::{accounts, encryption};
use crate::cli::sender::now;
use crate::config::Loaded;
use crate::job::KeyArn;
use crate::kms::{Account, CallError, ErrorKind, Kms, Look, PlainEndpoint, Role, Whose};
use crate::telemetry::Metrics;
use futures_util::future::join_all;
use std::time::Duration;
use time::OffsetDateTime;

/// The id of no key. AWS says `NotFoundException` to whoever may look at any key of the account.
const NO_KEY: &str = "00000000-0000-0000-0000-000000000000";

/// A key of a target that is looked at.
struct Probe {
    check: String,
    key: KeyArn,
    /// One of our last jobs was about it.
    is_known: bool,
}

pub(super) async fn check(loaded: &Loaded, seen: Option<&Seen>, timeout: Duration) -> anyhow::Result<Vec<Finding>> {
    const CHECK: &str = "aws";
    if loaded.settings.targets.is_empty() {
        return Ok(vec![Finding::skipped(CHECK, "setting_missing", "targets are missing")]);
    }
    let Ok(accounts) = accounts(loaded) else {
        return Ok(vec![Finding::skipped(CHECK, "needs_settings", "a file that targets name is not as it should be")]);
    };
    let (metrics, targets, worker) = (Metrics::new()?, accounts.clone(), &loaded.settings.worker);
    let asking = Box::pin(async {
        let kms = Kms::connect(accounts, worker.aws_timeout(), encryption(worker), &metrics).await?;
        Ok::<_, PlainEndpoint>(join_all(targets.iter().map(|target| of_target(&kms, target, seen))).await)
    });
    let found = match within(timeout, CHECK, "aws_unreachable", asking).await {
        Ok(Ok(found)) => found,
        Ok(Err(plain)) => {
            let advice = "name an https endpoint, or none";
            return Ok(vec![Finding::failed("aws.endpoint", "aws_endpoint_http", plain.to_string(), advice)]);
        }
        Err(finding) => return Ok(vec![finding]),
    };
    let (found, clocks): (Vec<_>, Vec<_>) = found.into_iter().unzip();
    let over_http = worker.allow_aws_over_http.then(|| {
        let told = "worker.allow_aws_over_http is on: on the way to an endpoint over plain http everybody can learn every key \
                    that is imported";
        Finding::warning("aws.endpoint", "aws_over_http", told, "take it out, unless KMS is a fake")
    });
    let found = over_http.into_iter().chain(found.into_iter().flatten());
    Ok(found.chain(clocks.into_iter().flatten().take(1)).collect())
}

/// What there is to say of a target, and of AWS's clock.
async fn of_target(kms: &Kms, target: &Account, seen: Option<&Seen>) -> (Vec<Finding>, Option<Finding>) {
    let probes: Vec<Probe> = target.regions.iter().filter_map(|region| probe(target, region, seen)).collect();
    let Some(first) = probes.first() else { return (Vec::new(), None) };
    let mut found = match (&target.role, kms.assume(&first.key).await) {
        (Some(role), Some(Err(error))) => {
            let wait =
                |probe: &Probe| Finding::skipped(&probe.check, "needs_role", "looked at once the role is assumed");
            let denied = of_role_denied(target, role, &error);
            return (std::iter::once(denied).chain(probes.iter().map(wait)).collect(), None);
        }
        (Some(Role { arn, .. }), _) => {
            let told = format!("the role {arn} is assumed, and is of this account");
            vec![Finding::ok(format!("aws.{}.role", target.account), told)]
        }
        (None, _) => vec![of_identity(target, kms.whose(&first.key).await)],
    };
    let looks = join_all(probes.iter().map(|probe| ask(kms, probe))).await;
    found.extend(probes.iter().zip(&looks).map(|(probe, (look, ..))| of(probe, look)));
    (found, looks.iter().find_map(of_clock))
}

fn of_role_denied(target: &Account, role: &Role, error: &CallError) -> Finding {
    let check = format!("aws.{}.role", target.account);
    let name = role.arn.rsplit('/').next().unwrap_or_default();
    let (code, advice) = match error.kind {
        ErrorKind::RoleDenied => (
            "aws_role_denied",
            format!(
                "with credentials of account {}: aws iam get-role --role-name {name} shows its trust policy. Principal must \
                 name who the worker is, which aws sts get-caller-identity tells; sts:ExternalId in Condition must be what \
                 targets.external_id_file holds, or be absent where that is not set; MaxSessionDuration must be {} or more. \
                 The worker's own policy must allow sts:AssumeRole on {}",
                target.account,
                role.session.as_secs(),
                role.arn
            ),
        ),
        ErrorKind::Credentials => (
            "aws_credentials_refused",
            "give the worker AWS credentials of its own, which assume the role: aws sts get-caller-identity tells whether \
             it has any, and whose"
                .to_owned(),
        ),
        _ => (
            "sts_unavailable",
            format!(
                "look at the network, at the proxy, at AWS_ENDPOINT_URL_STS if it is set, and whether there is an STS in {} \
                 that is as the target's settings want it (sts_region, fips, dual_stack)",
                target.sts_region
            ),
        ),
    };
    Finding::failed(check, code, error.to_string(), advice)
}

/// Of a target without a role. AWS imports no material into keys of another account (AWS KMS API Reference,
/// `ImportKeyMaterial`, "Cross-account use").
fn of_identity(target: &Account, whose: Result<Whose, CallError>) -> Finding {
    let check = format!("aws.{}.identity", target.account);
    match whose {
        Ok(Whose { account, arn }) if account == target.account => {
            Finding::ok(check, format!("the credentials are of this account: {arn}"))
        }
        Ok(Whose { account, arn }) => Finding::failed(
            check,
            "aws_other_account",
            format!(
                "the credentials are of account {account}: {arn}; AWS takes material for keys of that account only"
            ),
            format!(
                "write into this target the role to assume there: role_arn = \"arn:{}:iam::{}:role/NAME\"",
                target.partition, target.account
            ),
        ),
        Err(error) => Finding::skipped(check, "aws_identity_unseen", format!("whose the credentials are: {error}")),
    }
}

/// With this host's time before and after.
async fn ask(kms: &Kms, probe: &Probe) -> (Look, OffsetDateTime, OffsetDateTime) {
    let before = now();
    (kms.look(&probe.key).await, before, now())
}

/// `None` for what is no partition, account or Region; the settings say so.
fn probe(target: &Account, region: &str, seen: Option<&Seen>) -> Option<Probe> {
    let Account { partition, account, .. } = target;
    let of_target =
        |key: &&KeyArn| (key.partition(), key.account(), key.region()) == (&**partition, &**account, region);
    let known = seen.and_then(|seen| seen.last_keys.iter().find(of_target));
    let key = match known {
        Some(key) => key.clone(),
        None => KeyArn::parse(&format!("arn:{partition}:kms:{region}:{account}:key/{NO_KEY}")).ok()?,
    };
    Some(Probe { check: format!("aws.{account}.{region}"), key, is_known: known.is_some() })
}

fn of(probe: &Probe, look: &Look) -> Finding {
    let Probe { check, key, is_known } = probe;
    let Err(error) = &look.outcome else {
        return Finding::ok(check, format!("AWS KMS answers, and the credentials may look at {key}"));
    };
    let says = format!("AWS KMS: {error}");
    match error.kind {
        ErrorKind::NotFound if *is_known => Finding::warning(
            check,
            "kms_key_gone",
            format!("AWS has no key {key}, which one of the last jobs was about"),
            "see whether the key was deleted, and whether the credentials are of the right account",
        ),
        ErrorKind::NotFound => Finding::ok(check, "AWS KMS answers, and the credentials may look at keys"),
        ErrorKind::AccessDenied if *is_known => Finding::failed(
            check,
            "aws_denied",
            says,
            format!("allow kms:DescribeKey to the worker's role, by IAM and by the policy of the key {key}"),
        ),
        ErrorKind::AccessDenied => {
            let message =
                "AWS KMS takes the credentials; no job here was about a key yet, so that rights on keys cannot be seen";
            Finding::skipped(check, "aws_rights_unseen", message)
        }
        ErrorKind::Credentials if is_skewed(error) => {
            Finding::failed(check, "aws_clock_off", says, "set this host's clock by NTP: timedatectl set-ntp true")
        }
        // Nothing was sent.
        ErrorKind::Credentials if error.code.is_none() => Finding::failed(
            check,
            "aws_no_credentials",
            says,
            "give the worker AWS credentials: a role of the host or pod, AWS_PROFILE, or AWS_ACCESS_KEY_ID and \
             AWS_SECRET_ACCESS_KEY",
        ),
        ErrorKind::Credentials => Finding::failed(
            check,
            "aws_credentials_refused",
            says,
            "the credentials are wrong or too old: aws sts get-caller-identity tells whose they are",
        ),
        ErrorKind::NotSent | ErrorKind::Unanswered => Finding::failed(
            check,
            "aws_unreachable",
            says,
            "look at the network, at the proxy, and at AWS_ENDPOINT_URL_KMS if it is set",
        ),
        ErrorKind::Throttled | ErrorKind::ServerFault => {
            Finding::warning(check, "aws_busy", says, "AWS is there and has no time now; look again later")
        }
        _ => Finding::failed(check, "aws_refused", says, "look at the target's partition, account and Region"),
    }
}

/// AWS has no code of its own for it in KMS.
fn is_skewed(error: &CallError) -> bool {
    ["Signature expired", "Signature not yet current"].iter().any(|words| error.message.contains(words))
        || matches!(error.code.as_deref(), Some("RequestTimeTooSkewed" | "RequestExpired"))
}

fn of_clock((look, before, after): &(Look, OffsetDateTime, OffsetDateTime)) -> Option<Finding> {
    Some(clock::compare("aws.clock".into(), "AWS's", look.date?, *before, *after))
}
