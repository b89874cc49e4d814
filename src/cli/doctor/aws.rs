//! AWS KMS, for each target: credentials, the right to look at a key, the clock. One harmless call each.

use super::database::Seen;
use super::finding::Finding;
use super::{clock, within};
use crate::cli::sender::now;
use crate::config::Loaded;
use crate::job::KeyArn;
use crate::kms::{CallError, ErrorKind, Kms, Look};
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
    let Ok(targets) = loaded.targets() else {
        return Ok(vec![Finding::skipped(CHECK, "setting_missing", "targets are missing")]);
    };
    let probes: Vec<Probe> = targets
        .iter()
        .flat_map(|target| target.regions.iter().map(move |region| (target, region)))
        .filter_map(|(target, region)| probe(&target.partition, &target.account, region, seen))
        .collect();
    let (regions, metrics) = (probes.iter().map(|probe| probe.key.region().to_owned()), Metrics::new()?);
    let asking = Box::pin(async {
        let kms = Kms::connect(regions, loaded.settings.worker.aws_timeout(), &metrics).await;
        join_all(probes.iter().map(|probe| ask(&kms, probe))).await
    });
    let looks = match within(timeout, CHECK, "aws_unreachable", asking).await {
        Ok(looks) => looks,
        Err(finding) => return Ok(vec![finding]),
    };
    let mut found: Vec<Finding> = probes.iter().zip(&looks).map(|(probe, (look, ..))| of(probe, look)).collect();
    found.extend(looks.iter().find_map(of_clock));
    Ok(found)
}

/// With this host's time before and after.
async fn ask(kms: &Kms, probe: &Probe) -> (Look, OffsetDateTime, OffsetDateTime) {
    let before = now();
    (kms.look(&probe.key).await, before, now())
}

/// `None` for what is no partition, account or Region; the settings say so.
fn probe(partition: &str, account: &str, region: &str, seen: Option<&Seen>) -> Option<Probe> {
    let of_target = |key: &&KeyArn| (key.partition(), key.account(), key.region()) == (partition, account, region);
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
