//! The queues of SQS that the settings name, as `keyferry topology check` looks at them.

use super::finding::Finding;
use super::within;
use crate::cli::topology::sqs_queues;
use crate::config::{Loaded, Transport};
use crate::sqs::{CallError, Fault, Finding as Found};
use std::time::Duration;

const CHECK: &str = "sqs";

pub(super) async fn check(loaded: &Loaded, timeout: Duration) -> anyhow::Result<Vec<Finding>> {
    if !loaded.uses(Transport::Sqs) {
        return Ok(vec![Finding::skipped(CHECK, "not_used", "neither requests nor events go over SQS")]);
    }
    let looking = Box::pin(async {
        // What is missing is among the settings' own findings.
        let Ok(queues) = sqs_queues(loaded).await else {
            return vec![Finding::skipped(CHECK, "setting_missing", "a queue's URL is missing in [sqs]")];
        };
        match queues.check().await {
            Ok(found) if found.is_empty() => vec![Finding::ok(CHECK, "the queues are there, and fit each other")],
            Ok(found) => found.iter().map(|(name, found)| of(name, found)).collect(),
            Err(error) => vec![failed(&error)],
        }
    });
    Ok(within(timeout, CHECK, "sqs_unreachable", looking).await.unwrap_or_else(|finding| vec![finding]))
}

fn of(name: &str, found: &Found) -> Finding {
    let message = format!("the queue {name} {found}");
    let check = format!("{CHECK}.{name}");
    let code = match found {
        Found::Missing => "sqs_missing",
        Found::SameQueue => "sqs_same_queue",
        Found::TypesDiffer => "sqs_types_differ",
        Found::NoRedrive(_) => "sqs_no_redrive",
        Found::RedriveElsewhere { .. } => "sqs_redrive_elsewhere",
        Found::FewReceipts(_) => "sqs_few_receipts",
        Found::ShortRetention => "sqs_short_retention",
        Found::DeadLettersMove => "sqs_dead_letters_move",
    };
    match found {
        Found::Missing => Finding::failed(check, code, message, "keyferry topology apply"),
        found if found.is_fatal() => Finding::failed(check, code, message, "name other queues in [sqs]"),
        _ => Finding::warning(check, code, message, "aws sqs set-queue-attributes"),
    }
}

fn failed(error: &CallError) -> Finding {
    let (code, advice) = match (error.fault, &error.code) {
        (Fault::Denied, None) => ("aws_no_credentials", "give the worker AWS credentials and a Region (sqs.region)"),
        (Fault::Denied, Some(_)) => {
            ("sqs_denied", "allow sqs:GetQueueAttributes, and what else the worker needs, to its role")
        }
        (Fault::Gone, _) => ("sqs_missing", "keyferry topology apply"),
        (Fault::Away | Fault::Throttled, _) => {
            ("sqs_unreachable", "look at the network, and at AWS_ENDPOINT_URL_SQS if it is set")
        }
        (Fault::Refused, _) => ("sqs_refused", "look at the queues' URLs in [sqs]"),
    };
    Finding::failed(CHECK, code, error.to_string(), advice)
}
