//! `keyferry policy`: what the policy says, before a worker says it.

use super::Failed;
use super::output::Output;
use super::sender::now;
use crate::config::{Loaded, PolicySource};
use crate::job::{DsmKeyRef, Envelope, KeyArn, KeyRef, MAX_BODY_BYTES, Request};
use crate::policy::{Ask, Identity, Policy, Verdict};
use anyhow::{Context as _, anyhow, bail};
use clap::{ArgGroup, Args, Subcommand};
use serde_json::{Map, Value, json};
use std::io::Read as _;
use std::path::{Path, PathBuf};

#[derive(Debug, Subcommand)]
pub(super) enum PolicyCommand {
    /// May somebody ask for something, and by which rule. Exit code 1 when not. Asks neither store nor AWS.
    Test(Box<Test>),
    /// Read a policy file and say what is wrong with it. Exit code 1 when something is.
    Check {
        /// The file; absent: that of the setting `policy`.
        file: Option<PathBuf>,
    },
    /// Say in plain words who may what.
    Show,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("asked").required(true).args(["key", "request"]))]
#[command(after_help = "Examples:\n  \
    keyferry policy test --as rabbitmq:payroll --key arn:aws:kms:eu-central-1:111122223333:key/... --source-key payroll-1\n  \
    keyferry policy test --as payroll --request request.json\n  \
    keyferry policy test --as key:payroll-2026 --key ... --operation delete --urgent")]
pub(super) struct Test {
    /// Who asks: `rabbitmq:USER`, `aws:AROA...`, `key:ID`, or the name of a principal.
    #[arg(long = "as", value_name = "WHO")]
    who: String,
    /// A request as it would be sent; - for standard input.
    #[arg(long, value_name = "FILE")]
    request: Option<PathBuf>,
    /// The KMS key, by its ARN.
    #[arg(long, value_name = "ARN")]
    key: Option<String>,
    /// import (default) or delete.
    #[arg(long, value_name = "NAME", requires = "key")]
    operation: Option<String>,
    /// The source key's tier.
    #[arg(long, value_name = "TIER", requires = "key")]
    tier: Option<String>,
    /// The source key's name; absent: one is generated.
    #[arg(long, value_name = "NAME", requires = "key")]
    source_key: Option<String>,
    /// The material expires then (RFC 3339).
    #[arg(long, value_name = "TIME", requires = "key")]
    valid_to: Option<String>,
    /// The delete overtakes its line.
    #[arg(long, requires = "key")]
    urgent: bool,
    /// Another policy file than that of the setting `policy`.
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
}

impl PolicyCommand {
    pub(super) fn run(self, loaded: &Loaded, output: Output) -> Result<(), Failed> {
        match self {
            Self::Test(test) => test.run(loaded, output),
            Self::Check { file } => check(loaded, file, output),
            Self::Show => {
                let policy = loaded.policy()?;
                let shown = json!({
                    "digest": policy.digest(), "explanation": policy.explain(), "warnings": policy.warnings(),
                });
                output.value(&shown, |_| explained(&policy));
                Ok(())
            }
        }
    }
}

/// A policy in plain words, with what its keeper should look at.
pub(super) fn explained(policy: &Policy) -> String {
    let warnings = policy.warnings().iter().map(|warning| format!("warning: {warning}"));
    policy.explain().into_iter().chain(warnings).collect::<Vec<_>>().join("\n")
}

fn check(loaded: &Loaded, file: Option<PathBuf>, output: Output) -> Result<(), Failed> {
    let source = file.map_or_else(|| loaded.policy_source(), |file| Ok(PolicySource::File(file)))?;
    let PolicySource::File(path) = source else {
        let ok = json!({"ok": true, "digest": Policy::AllowAll.digest(), "warnings": []});
        output.value(&ok, |_| explained(&Policy::AllowAll));
        return Ok(());
    };
    let text =
        std::fs::read_to_string(&path).with_context(|| format!("the policy file {} cannot be read", path.display()))?;
    match Policy::parse(&text) {
        Ok(policy) => {
            let ok = json!({"ok": true, "digest": policy.digest(), "warnings": policy.warnings()});
            output.value(&ok, |_| {
                let warnings = policy.warnings().iter().map(|warning| format!("\nwarning: {warning}"));
                format!("{} is good{}", path.display(), warnings.collect::<Vec<_>>().concat())
            });
            Ok(())
        }
        Err(error) => {
            let wrong = json!({
                "ok": false, "file": path, "line": error.line, "code": error.code, "message": error.to_string(),
            });
            output.value(&wrong, |_| format!("{}, {error}", path.display()));
            Err(Failed::Said)
        }
    }
}

impl Test {
    fn run(self, loaded: &Loaded, output: Output) -> Result<(), Failed> {
        let policy = match &self.policy {
            Some(file) => PolicySource::File(file.clone()).read()?,
            None => loaded.policy()?,
        };
        let request = self.asked()?;
        let KeyRef::Arn(key) = &request.key else {
            return Err(
                anyhow!("the KMS key: name it by its ARN; Keyferry's own ids are known to the store only").into()
            );
        };
        let principal = match Identity::parse(&self.who) {
            Some(identity) => policy.principal(&identity).map(str::to_owned),
            None => Some(self.who.clone()).filter(|name| policy.knows(name)),
        };
        let answer = match &principal {
            // Whoever it is.
            _ if matches!(policy, Policy::AllowAll) => judged(&policy, crate::policy::ANONYMOUS, &request, key, loaded),
            Some(principal) => judged(&policy, principal, &request, key, loaded),
            None => json!({
                "allowed": false, "principal": null, "rule": null,
                "why": format!("the policy has no principal for {}", self.who), "nearest": [],
            }),
        };
        output.value(&answer, said);
        if answer["allowed"] == true { Ok(()) } else { Err(Failed::Said) }
    }

    /// The request, read as a worker reads it.
    fn asked(&self) -> anyhow::Result<Request> {
        let body = match &self.request {
            Some(file) => read_body(file)?,
            None => serde_json::to_vec(&self.flags())?,
        };
        // Who is asked about has no id yet.
        let envelope = Envelope { body: &body, content_type: None, message_id: Some("policy-test") };
        Request::parse(envelope).map_err(|rejected| {
            anyhow!("a worker would refuse this before it looks at the policy: {}", rejected.refusal.message)
        })
    }

    fn flags(&self) -> Value {
        let mut fields = Map::new();
        let given = [
            ("key", &self.key),
            ("operation", &self.operation),
            ("source_key_tier", &self.tier),
            ("source_key_identifier", &self.source_key),
            ("valid_to", &self.valid_to),
        ];
        for (name, value) in given {
            if let Some(value) = value {
                fields.insert(name.to_owned(), json!(value));
            }
        }
        if self.valid_to.is_some() {
            fields.insert("key_expiration".into(), json!(true));
        }
        if self.urgent {
            fields.insert("urgent".into(), json!(true));
        }
        Value::Object(fields)
    }
}

fn read_body(file: &Path) -> anyhow::Result<Vec<u8>> {
    let most = MAX_BODY_BYTES as u64 + 1;
    let mut body = Vec::new();
    if file.as_os_str() == "-" {
        std::io::stdin().lock().take(most).read_to_end(&mut body)?;
    } else {
        let opened = std::fs::File::open(file);
        opened
            .and_then(|opened| opened.take(most).read_to_end(&mut body))
            .with_context(|| format!("the file {} cannot be read", file.display()))?;
    }
    if body.len() > MAX_BODY_BYTES {
        bail!("the request is larger than 64 KiB");
    }
    Ok(body)
}

fn judged(policy: &Policy, principal: &str, request: &Request, key: &KeyArn, loaded: &Loaded) -> Value {
    let dsm = request.work.dsm_key().and_then(|reference| full_name(loaded, reference));
    let ask = Ask::of(principal, request, key, dsm.as_deref(), now());
    match policy.judge(&ask) {
        Verdict::Allowed(grant) => {
            let rule = grant.rule.as_ref().and_then(|name| policy.rules().iter().find(|rule| rule.name == *name));
            json!({
                "allowed": true, "principal": principal, "rule": grant.rule,
                "conditions": rule.map(crate::policy::Rule::condition_words).unwrap_or_default(),
            })
        }
        Verdict::Denied { rule, why } => {
            let nearest = if rule.is_some() { Vec::new() } else { policy.nearest(&ask) };
            json!({"allowed": false, "principal": principal, "rule": rule, "why": why, "nearest": nearest})
        }
    }
}

/// With the connection that is meant where none is named.
fn full_name(loaded: &Loaded, reference: &DsmKeyRef) -> Option<String> {
    let settings = &loaded.settings;
    let only = settings.dsm.keys().next().filter(|_| settings.dsm.len() == 1);
    let connection = reference.connection().or(settings.dsm_default.as_deref()).or(only.map(String::as_str))?;
    Some(format!("{connection}/{}", reference.key()))
}

fn said(answer: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let principal = text(&answer["principal"]);
    if answer["allowed"] == true {
        let conditions: Vec<String> = answer["conditions"].as_array().into_iter().flatten().map(text).collect();
        let conditions = if conditions.is_empty() { String::new() } else { format!(": {}", conditions.join("; ")) };
        return match answer["rule"].as_str() {
            Some(rule) => format!("allowed to {principal} by the rule \"{rule}\"{conditions}"),
            None if answer["principal"] == crate::policy::ANONYMOUS => "allowed: the policy is allow-all".into(),
            None => format!(
                "allowed to {principal} as far as can be told; which rule decides is seen when the source key is known"
            ),
        };
    }
    let near = answer["nearest"].as_array().into_iter().flatten().map(|near| {
        let because: Vec<String> = near["because"].as_array().into_iter().flatten().map(text).collect();
        format!("\n  the rule \"{}\" does not fit by its {}", text(&near["rule"]), because.join("; "))
    });
    let who = if principal.is_empty() { "denied".to_owned() } else { format!("denied to {principal}") };
    format!("{who}: {}{}", text(&answer["why"]), near.collect::<Vec<_>>().concat())
}
