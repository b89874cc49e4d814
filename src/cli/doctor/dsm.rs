//! Each connection of the dsm tier, as `keyferry source check dsm` looks at it.

use super::finding::Finding;
use super::{settings, within};
use crate::config::Loaded;
use crate::source::Dsm;
use crate::telemetry::Metrics;
use futures_util::future::join_all;
use std::time::Duration;

pub(super) async fn check(loaded: &Loaded, timeout: Duration) -> anyhow::Result<Vec<Finding>> {
    let settings = &loaded.settings;
    if settings.dsm.is_empty() {
        return Ok(vec![Finding::skipped(
            "dsm",
            "not_used",
            "no table [dsm.NAME]: keys come from the local store alone",
        )]);
    }
    let dsm = match Dsm::new(&settings.dsm, settings.dsm_default.as_deref(), &Metrics::new()?) {
        Ok(dsm) => dsm,
        Err(error) => return Ok(vec![settings::of("dsm", &error)]),
    };
    let each = join_all(settings.dsm.keys().map(|name| connection(&dsm, name, timeout))).await;
    Ok(each.into_iter().flatten().collect())
}

async fn connection(dsm: &Dsm, name: &str, timeout: Duration) -> Vec<Finding> {
    let check = format!("dsm.{name}");
    let advice = format!("keyferry source check dsm {name}");
    match within(timeout, &check, "dsm_no_answer", dsm.check(Some(name))).await {
        Err(finding) => vec![finding],
        Ok(Err(error)) => vec![Finding::failed(check, error.code(), error.to_string(), advice)],
        Ok(Ok((_, servers))) => servers
            .iter()
            .map(|server| match &server.outcome {
                Ok(details) => {
                    let message = format!("{} answers, by KMIP {}", server.server, details.kmip_version);
                    Finding::ok(&check, message)
                }
                Err(error) => Finding::failed(&check, error.code(), format!("{}: {error}", server.server), &advice),
            })
            .collect(),
    }
}
