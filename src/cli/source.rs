//! `keyferry source`: the tiers that keys come from.

use super::output::Output;
use super::{Coded, Failed};
use crate::config::Loaded;
use crate::job::{DsmKeyRef, KeyKind};
use crate::source::{Dsm, DsmError, ServerDetails, ServerReport};
use crate::telemetry::Metrics;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

#[derive(Debug, Subcommand)]
pub(super) enum Source {
    /// See whether a tier works and what it can see. Changes nothing, and prints no key's bytes.
    #[command(subcommand)]
    Check(Check),
}

#[derive(Debug, Subcommand)]
pub(super) enum Check {
    /// Connect to each server of a [dsm.NAME] table. Exit code 1 when one of them, or the key, cannot be used.
    Dsm(CheckDsm),
}

#[derive(Debug, Args)]
pub(super) struct CheckDsm {
    /// The connection's NAME; the default one if absent.
    name: Option<String>,
    /// Whether this key could be imported, by unique identifier or name, as in `source_key_identifier`.
    #[arg(long, value_name = "REF", requires = "kind", value_parser = DsmKeyRef::parse)]
    key: Option<DsmKeyRef>,
    /// The kind that the KMS key takes, named as AWS's `KeySpec`.
    #[arg(long, requires = "key", value_parser = super::keys::kind())]
    kind: Option<KeyKind>,
}

impl Source {
    pub(super) async fn run(self, loaded: &Loaded, output: Output) -> Result<(), Failed> {
        let Self::Check(Check::Dsm(check)) = self;
        check.run(loaded, output).await
    }
}

impl CheckDsm {
    async fn run(self, loaded: &Loaded, output: Output) -> Result<(), Failed> {
        let settings = &loaded.settings;
        let dsm = Dsm::new(&settings.dsm, settings.dsm_default.as_deref(), &Metrics::new()?)?;
        let (name, servers) = dsm.check(self.name.as_deref()).await.map_err(|error| coded(&error))?;
        let key = match self.key.zip(self.kind) {
            None => None,
            Some((key, kind)) => {
                // The connection that is checked is meant, unless the key says another.
                let key = match key.connection() {
                    Some(_) => Ok(key),
                    None => DsmKeyRef::parse(&format!("{name}/{key}")),
                };
                Some((kind, dsm.fetch(&key?, kind).await))
            }
        };
        let is_usable = servers.iter().all(|server| server.outcome.is_ok())
            && key.as_ref().is_none_or(|(_, fetched)| fetched.is_ok());
        let key = key.map(|(kind, fetched)| match fetched {
            Ok(fetched) => json!({
                "usable": true, "kind": kind.as_str(), "connection": fetched.connection,
                "unique_identifier": fetched.unique_identifier, "name": fetched.name,
            }),
            Err(error) => json!({"usable": false, "kind": kind.as_str(), "error": said(&error)}),
        });
        let mut report = json!({
            "connection": name, "ok": is_usable, "servers": servers.iter().map(server).collect::<Vec<_>>(),
        });
        if let (Some(key), Some(report)) = (&key, report.as_object_mut()) {
            report.insert("key".into(), key.clone());
        }
        output.value(&report, |_| {
            let mut lines: Vec<String> = servers.iter().map(line).collect();
            lines.extend(key.as_ref().map(key_line));
            lines.join("\n")
        });
        if is_usable { Ok(()) } else { Err(Failed::Said) }
    }
}

fn coded(error: &DsmError) -> Coded {
    Coded { code: error.code(), message: error.to_string() }
}

fn said(error: &DsmError) -> Value {
    json!({"code": error.code(), "message": error.to_string()})
}

fn server(report: &ServerReport) -> Value {
    match &report.outcome {
        Ok(details) => json!({"server": report.server, "ok": true, "details": details}),
        Err(error) => json!({"server": report.server, "ok": false, "error": said(error)}),
    }
}

fn line(report: &ServerReport) -> String {
    let ServerReport { server, outcome } = report;
    match outcome {
        Ok(ServerDetails { kmip_version, tls_version, certificate, visible_objects, more_objects }) => {
            let certificate = certificate.as_ref().map_or_else(String::new, |holder| {
                let name = holder.common_name.as_deref().unwrap_or("without a name");
                format!(", certificate {name} until {}", holder.not_after)
            });
            let more = if *more_objects { " or more" } else { "" };
            format!(
                "{server}: works; KMIP {kmip_version}, {tls_version}{certificate}; sees {visible_objects}{more} objects"
            )
        }
        Err(error) => format!("{server}: does not work: {error}"),
    }
}

fn key_line(key: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    if key["usable"] == true {
        let name = key["name"].as_str().map_or_else(String::new, |name| format!(" ({name})"));
        format!("key {}{name}: can be used as {}", text(&key["unique_identifier"]), text(&key["kind"]))
    } else {
        format!("key: cannot be used as {}: {}", text(&key["kind"]), text(&key["error"]["message"]))
    }
}
