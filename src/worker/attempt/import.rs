//! An import: choose, compare, parameters, commit, wrap, send, verify.

use super::choose::choose;
use super::judge::{Verdict, judge};
use super::source_key::SourceKey;
use super::{Or, Run, sha256_hex};
use crate::audit::{Fact, Kind};
use crate::job::{
    Expiry, FailureCode, Import, ImportParameters, KeyArn, KeyKind, Scarce, SourceMaterial, Wrapping, rfc3339,
};
use crate::kms::{CallError, ErrorKind, ImportCall, Imported, KeyDescription, MaterialRole, RegionRole};
use crate::retry::Class;
use crate::source::SealedKey;
use crate::store::{Answered, Intent, Parameters, Prepared, Settlement, Step};
use crate::worker::meters::Stage;
use crate::wrap::{WrapError, wrap};
use serde_json::json;
use std::sync::Arc;

/// A refusal this close to the material's end of life may be for that alone: AWS has a clock of its own.
const EXPIRY_MARGIN: time::Duration = time::Duration::minutes(10);
/// Kept parameters are used while at least this much of their day is left.
const PARAMETERS_MARGIN: time::Duration = time::Duration::minutes(10);

/// What an import does: equal texts mean that repeating one changes nothing.
pub(super) fn effect(source_key_id: &str, expiry: Expiry) -> String {
    format!("import {source_key_id} {}", expiry_text(expiry))
}

pub(super) fn expiry_text(expiry: Expiry) -> String {
    match expiry {
        Expiry::Never => "never".into(),
        Expiry::At(at) => rfc3339(at),
    }
}

impl Run {
    pub(super) async fn import(&mut self, import: &Import, kind: KeyKind, before: KeyDescription) -> Or<Settlement> {
        let asked = &import.material;
        if self.answered.is_some() {
            self.source_key = self.chosen_source_key();
            return self.verify_import(asked, kind, before).await;
        }
        let source = self.named_source_key(asked, kind).await?;
        self.source_key.clone_from(&source);
        // Now by the name of the key that it is.
        self.authorise().await?;
        if !self.effect_is_known_early() {
            let own_effect = source.as_ref().map(|key| effect(&key.id(), asked.expiry));
            self.judge_late(own_effect.as_ref())?;
        }
        let role = match choose(&self.job, import, kind, &before, source.as_ref()) {
            Ok(role) => role,
            Err(none) => return self.fail(none.code, &none.message),
        };
        let wrapping = self.choose_wrapping(asked, kind)?;
        self.compare_public_key(kind, &before).await?;
        if self.job.request.dry_run {
            return self.would_import(asked, kind, &before, role, wrapping).await;
        }
        let (parameters, are_new) = self.parameters(&self.job.key.clone(), wrapping).await?;
        crate::failpoint!("worker.after_parameters");
        let wrapped = self.commit_and_wrap(asked, kind, source, &parameters, are_new).await?;
        self.send_import(asked, kind, &before, role, &parameters, wrapped).await?;
        crate::failpoint!("worker.after_import");
        let _timing = self.attempt.context.meters.time(Stage::Verify);
        let after = self.describe().await?;
        self.verify_import(asked, kind, after).await
    }

    /// The key that was chosen before.
    pub(super) fn chosen_source_key(&self) -> Option<SourceKey> {
        let local = self.job.source_key.clone().map(SourceKey::Local);
        self.job.progress.dsm.clone().map(SourceKey::Dsm).or(local)
    }

    pub(super) fn choose_wrapping(&mut self, asked: &SourceMaterial, kind: KeyKind) -> Or<Wrapping> {
        let chosen = Wrapping::choose(kind, self.partition(), asked.wrapping_algorithm, asked.wrapping_key_spec);
        let wrapping = match chosen {
            Ok(wrapping) => wrapping,
            Err(none) => return self.fail(FailureCode::WrappingNotAllowed, &none.to_string()),
        };
        if asked.description.is_some() && !kind.has_material_ids() {
            let message = "AWS keeps a key_material_description for symmetric keys only; leave it out";
            return self.fail(FailureCode::DescriptionNotAllowed, message);
        }
        Ok(wrapping)
    }

    /// A pair that holds material shows which: other material is found before a scarce call is spent on it.
    async fn compare_public_key(&mut self, kind: KeyKind, before: &KeyDescription) -> Or<()> {
        let Some(key) = self.source_key.clone().filter(|_| kind.is_pair() && before.expiry.is_some()) else {
            return Ok(());
        };
        self.not_stopping()?;
        let theirs = match self.attempt.context.kms.public_key(&self.job.key, &self.attempt.guard).await {
            Ok(theirs) => theirs,
            // Expired or deleted since the look at the key: it takes the same again.
            Err(error) if error.kind == ErrorKind::InvalidState => return Ok(()),
            Err(error) => return self.read_failed(&error),
        };
        if self.is_own_public_key(kind, &theirs) {
            return Ok(());
        }
        // A pair has one material for life: an import of ours has not taken effect, and never can.
        self.in_doubt = false;
        let message = format!(
            "AWS's GetPublicKey shows another pair than {} key {}; a KMS key takes only the pair that it was given \
             first: name that source key, or use another KMS key",
            key.tier(),
            key.name()
        );
        self.fail(FailureCode::OtherMaterial, &message)
    }

    /// The set kept from an earlier attempt while it is good, else a fresh one, and whether it is fresh.
    pub(super) async fn parameters(&mut self, key: &KeyArn, wrapping: Wrapping) -> Or<(ImportParameters, bool)> {
        if let Some(kept) = &self.job.progress.parameters
            && kept.region == key.region()
            && kept.valid_to - self.job.now > PARAMETERS_MARGIN
            && kept.wrapping == wrapping
        {
            return Ok((kept.clone(), false));
        }
        Ok((self.fresh_parameters(key, wrapping).await?, true))
    }

    async fn fresh_parameters(&mut self, key: &KeyArn, wrapping: Wrapping) -> Or<ImportParameters> {
        self.not_stopping()?;
        self.slot(key, Scarce::GetParametersForImport).await?;
        let _timing = self.attempt.context.meters.time(Stage::Parameters);
        match self.attempt.context.kms.parameters(key, wrapping, &self.attempt.guard).await {
            Ok(parameters) => Ok(parameters),
            Err(error) => self.read_failed(&error),
        }
    }

    /// Makes durable which key is imported, generating it where none is named, and wraps it.
    pub(super) async fn commit_and_wrap(
        &mut self,
        asked: &SourceMaterial,
        kind: KeyKind,
        source: Option<SourceKey>,
        parameters: &ImportParameters,
        are_new: bool,
    ) -> Or<Vec<u8>> {
        let (key, generated) = if let Some(key) = source {
            (key, None)
        } else {
            // After the parameters: a key of RSA takes seconds, and would be thrown away with a throttled call.
            let key = self.generate(kind).await?;
            (SourceKey::Local(key.clone()), Some(Box::new(key)))
        };
        self.source_key = Some(key.clone());
        self.commit_import(asked, &key, generated, parameters, are_new).await?;
        let wrapped = self.wrap(key, parameters).await?;
        crate::failpoint!("worker.after_wrap");
        Ok(wrapped)
    }

    async fn generate(&mut self, kind: KeyKind) -> Or<SealedKey> {
        let _timing = self.attempt.context.meters.time(Stage::Generate);
        let name = format!("keyferry-{}", self.job.id);
        let context = Arc::clone(&self.attempt.context);
        let made = self
            .compute(Arc::clone(&self.attempt.generating), move || {
                SealedKey::generate(&context.keyring, uuid::Uuid::now_v7(), name, kind)
            })
            .await?;
        match made {
            Ok(key) => Ok(key),
            Err(error) => {
                let message = error.to_string();
                self.retry(Class::Transient, "generate", &message, None)
            }
        }
    }

    /// From here on every attempt, by any worker, imports the same bytes, and a successor knows that a call
    /// may be under way.
    async fn commit_import(
        &mut self,
        asked: &SourceMaterial,
        key: &SourceKey,
        generated: Option<Box<SealedKey>>,
        parameters: &ImportParameters,
        are_new: bool,
    ) -> Or<()> {
        let mut facts = Vec::new();
        let (attempt, expiry) = (self.job.attempt, expiry_text(asked.expiry));
        // Either says that an import is about to be sent; the first also that no other material ever will be.
        facts.push(if self.job.progress.is_chosen {
            Fact::new(Kind::ImportIntended, json!({"attempt": attempt, "expiry": expiry}))
        } else {
            Fact::new(
                Kind::MaterialChosen,
                json!({
                    "tier": key.tier(),
                    "source_key_id": key.id(),
                    "source_key_name": key.name(),
                    "generated": generated.is_some(),
                    "attempt": attempt,
                    "expiry": expiry,
                }),
            )
        });
        if are_new {
            facts.push(obtained(parameters));
        }
        let intent = Intent::Import {
            source: key.chosen(),
            generated,
            parameters: are_new.then(|| Box::new(parameters.clone())),
            rotated_from: self.rotated_from.clone(),
        };
        // A rotate's is known before its key is.
        let effect = self.effect_known_early().unwrap_or_else(|| effect(&key.id(), asked.expiry));
        self.commit(intent, effect, facts).await?;
        self.parameters = Parameters::Kept;
        crate::failpoint!("worker.after_prepare");
        self.not_stopping()
    }

    /// Makes a step durable under the lease.
    pub(super) async fn commit(&mut self, intent: Intent, effect: String, facts: Vec<Fact>) -> Or<()> {
        let _timing = self.attempt.context.meters.time(Stage::Prepare);
        let step = Step { lease: self.job.lease, job_id: self.job.id, intent, effect: effect.clone(), facts };
        match self.attempt.steps.submit(step).await {
            Some(Ok(Prepared::Ready)) => {
                self.effect = Some(effect);
                self.has_committed = true;
                Ok(())
            }
            Some(Ok(Prepared::LeaseLost)) | None => Err(None),
            Some(Ok(Prepared::SourceKeyDeleted)) => {
                self.fail(FailureCode::SourceKeyDeleted, "the source key was deleted")
            }
            Some(Ok(Prepared::Ending(ending))) => self.ended_by_operator(ending),
            Some(Ok(Prepared::Held)) => self.held(),
            Some(Err(error)) => {
                let message = error.to_string();
                self.retry(Class::Transient, "store", &message, None)
            }
        }
    }

    pub(super) async fn wrap(&mut self, key: SourceKey, parameters: &ImportParameters) -> Or<Vec<u8>> {
        let _timing = self.attempt.context.meters.time(Stage::Wrap);
        let (public_key, wrapping) = (parameters.public_key.clone(), parameters.wrapping);
        let wrapped = self.with_plain(key, move |key| wrap(key.material().expose(), &public_key, wrapping)).await?;
        match wrapped {
            Ok(wrapped) => Ok(wrapped),
            Err(error @ WrapError::Random) => {
                let message = error.to_string();
                self.retry(Class::Transient, "wrap", &message, None)
            }
            Err(error) => {
                // A set that cannot be used: ask for another, once.
                let message = error.to_string();
                self.refresh("wrap", &message, None, FailureCode::UnexpectedAnswer)
            }
        }
    }

    /// The one mutating call.
    async fn send_import(
        &mut self,
        asked: &SourceMaterial,
        kind: KeyKind,
        before: &KeyDescription,
        role: MaterialRole,
        parameters: &ImportParameters,
        wrapped: Vec<u8>,
    ) -> Or<()> {
        let key = self.job.key.clone();
        match self.call_import(&key, asked, kind, role, parameters, wrapped).await? {
            Ok(imported) => {
                self.in_doubt = false;
                self.answered = Some(Answered { key_material_id: imported.key_material_id });
                Ok(())
            }
            Err(error) => self.import_failed(asked, kind, before, &error),
        }
    }

    /// `ImportKeyMaterial` on the job's key, or on its namesake in another Region. What may have happened is noted.
    pub(super) async fn call_import(
        &mut self,
        key: &KeyArn,
        asked: &SourceMaterial,
        kind: KeyKind,
        role: MaterialRole,
        parameters: &ImportParameters,
        wrapped: Vec<u8>,
    ) -> Or<Result<Imported, CallError>> {
        let call = ImportCall {
            import_token: &parameters.import_token,
            wrapped,
            expiry: asked.expiry,
            description: self.description(asked, kind, &role),
            role,
        };
        self.slot(key, Scarce::ImportKeyMaterial).await?;
        self.authorise().await?;
        let timing = self.attempt.context.meters.time(Stage::Import);
        let answer = self.attempt.context.kms.import(key, call, &self.attempt.guard).await;
        drop(timing);
        crate::failpoint!("worker.after_answer");
        match &answer {
            Ok(imported) => self.facts.push(Fact::new(
                Kind::MaterialImported,
                json!({
                    "attempt": self.job.attempt,
                    "region": key.region(),
                    "key_material_id": imported.key_material_id,
                    "expiry": expiry_text(asked.expiry),
                    "aws_request_id": imported.aws_request_id,
                }),
            )),
            Err(error) if error.kind.may_have_taken_effect() => {
                self.in_doubt = true;
                self.unanswered = true;
            }
            Err(_) => {}
        }
        Ok(answer)
    }

    /// The job's mark, by which its material is known as ours; on a reimport AWS keeps the old text unless a
    /// new one is given.
    fn description(&self, asked: &SourceMaterial, kind: KeyKind, role: &MaterialRole) -> Option<String> {
        let given = asked.description.as_deref();
        match role {
            _ if !kind.has_material_ids() => None,
            MaterialRole::Existing(_) if given.is_none() => None,
            _ => Some([given.unwrap_or(""), &format!("keyferry:{}", self.job.id)].join(" ").trim_start().to_owned()),
        }
    }

    /// The import did not succeed, or was not answered.
    fn import_failed<T>(
        &mut self,
        asked: &SourceMaterial,
        kind: KeyKind,
        before: &KeyDescription,
        error: &CallError,
    ) -> Or<T> {
        if error.kind == ErrorKind::IncorrectKeyMaterial {
            if before.role == RegionRole::Replica && self.is_on_record() {
                // The primary was given it moments ago, and has not yet told the replica.
                let (text, id) = (error.to_string(), error.aws_request_id.as_deref());
                return self.wait_for_aws(error.operation, &text, id, FailureCode::OtherMaterial);
            }
            self.has_not_expired(asked, error)?;
            if !kind.has_material_ids() {
                // One material for life: had an import of ours taken effect, this identical one would have been taken.
                self.in_doubt = false;
            }
        }
        self.import_refused(error)
    }

    /// What follows where the error says enough.
    pub(super) fn import_refused<T>(&mut self, error: &CallError) -> Or<T> {
        let (step, text, id) = (error.operation, error.to_string(), error.aws_request_id.as_deref());
        match judge(error) {
            Verdict::Retry(class) => self.retry(class, step, &text, id),
            Verdict::Await(give_up) => self.wait_for_aws(step, &text, id, give_up),
            Verdict::Refresh(give_up) => self.refresh(step, &text, id, give_up),
            Verdict::Fail(code, advice) => self.fail(code, &format!("{text}; {advice}")),
        }
    }

    /// AWS does not take material whose end has come: a refusal shortly before it says nothing of the bytes.
    pub(super) fn has_not_expired(&mut self, asked: &SourceMaterial, error: &CallError) -> Or<()> {
        match asked.expiry {
            Expiry::At(at) if at - self.job.now < EXPIRY_MARGIN => {
                let message = format!("{error}; valid_to may have passed on the way: send a new request");
                self.fail(FailureCode::ValidToPassed, &message)
            }
            _ => Ok(()),
        }
    }

    /// Whether a job has put the chosen key's material on a key of this line.
    fn is_on_record(&self) -> bool {
        self.source_key
            .as_ref()
            .is_some_and(|key| self.job.materials.iter().any(|held| held.fingerprint == *key.fingerprint()))
    }

    /// Throws the parameters away and tries at once with fresh ones. Refused a second time it is the end, unless an
    /// earlier call may have used the first set up: then it goes on, slowly, until the outcome is known.
    fn refresh<T>(&mut self, step: &str, message: &str, aws_request_id: Option<&str>, give_up: FailureCode) -> Or<T> {
        let class = match self.job.progress.refreshes {
            0 => Class::Immediate,
            _ if self.in_doubt => Class::Transient,
            _ => return self.fail(give_up, &format!("{message}; fresh import parameters did not help")),
        };
        self.parameters = Parameters::Refused;
        self.retry(class, step, message, aws_request_id)
    }
}

/// What the audit trail says of a set of parameters.
pub(super) fn obtained(parameters: &ImportParameters) -> Fact {
    Fact::new(
        Kind::ParametersObtained,
        json!({
            "region": parameters.region,
            "wrapping_algorithm": parameters.wrapping.algorithm.as_str(),
            "wrapping_key_spec": parameters.wrapping.key_spec.as_str(),
            "public_key_sha256": sha256_hex(&parameters.public_key),
            "valid_to": rfc3339(parameters.valid_to),
            "aws_request_id": parameters.aws_request_id,
        }),
    )
}
