//! The source key of a job, of whichever tier, and how its bytes are come by.

use super::{Or, Run};
use crate::job::{DsmKeyRef, FailureCode, KeyKind, SourceKeyRef, SourceMaterial};
use crate::retry::Class;
use crate::source::{Fingerprint, OpenError, PlainKey, SealedKey};
use crate::store::{Chosen, DsmChoice};
use crate::worker::meters::Stage;
use std::sync::Arc;
use tokio::sync::Semaphore;
use uuid::Uuid;

/// A source key. Of one that a KMIP server holds there is only the reference here.
#[derive(Clone, Debug)]
pub(super) enum SourceKey {
    Local(SealedKey),
    Dsm(DsmChoice),
}

impl SourceKey {
    pub(super) fn tier(&self) -> &'static str {
        match self {
            Self::Local(_) => "local",
            Self::Dsm(_) => "dsm",
        }
    }

    /// Its name for ever.
    pub(super) fn id(&self) -> String {
        match self {
            Self::Local(key) => key.id.to_string(),
            Self::Dsm(key) => format!("{}/{}", key.connection, key.key_id),
        }
    }

    /// By which a request may ask for it.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Local(key) => key.name.clone(),
            Self::Dsm(key) => format!("{}/{}", key.connection, key.key_name.as_ref().unwrap_or(&key.key_id)),
        }
    }

    pub(super) fn fingerprint(&self) -> &Fingerprint {
        match self {
            Self::Local(key) => &key.fingerprint,
            Self::Dsm(key) => &key.fingerprint,
        }
    }

    /// The row of the local store.
    pub(super) fn local_id(&self) -> Option<Uuid> {
        match self {
            Self::Local(key) => Some(key.id),
            Self::Dsm(_) => None,
        }
    }

    pub(super) fn chosen(&self) -> Chosen {
        match self {
            Self::Local(key) => Chosen::Local(key.id),
            Self::Dsm(key) => Chosen::Dsm(key.clone()),
        }
    }
}

impl Run {
    /// The key that was chosen before, or that the request names; `None`: one is to be generated, or there is none of
    /// that name.
    pub(super) async fn named_source_key(&mut self, asked: &SourceMaterial, kind: KeyKind) -> Or<Option<SourceKey>> {
        match &asked.source_key {
            SourceKeyRef::Local(_) => Ok(self.job.source_key.clone().map(SourceKey::Local)),
            SourceKeyRef::Dsm(reference) => self.fetch(reference, kind).await.map(Some),
        }
    }

    /// The key that was chosen, for another Region. One that a KMIP server holds is fetched again once its bytes were used.
    pub(super) async fn source_again(&mut self, asked: &SourceMaterial, kind: KeyKind) -> Or<Option<SourceKey>> {
        match (&asked.source_key, &self.fetched) {
            (SourceKeyRef::Dsm(reference), None) => self.fetch(reference, kind).await.map(Some),
            _ => Ok(self.source_key.clone()),
        }
    }

    /// Fetches a key from its KMIP server and keeps it until it is wrapped. The same that was chosen before, if one was.
    async fn fetch(&mut self, reference: &DsmKeyRef, kind: KeyKind) -> Or<SourceKey> {
        self.not_stopping()?;
        let _timing = self.attempt.context.meters.time(Stage::Source);
        let committed = self.job.progress.dsm.clone();
        let context = Arc::clone(&self.attempt.context);
        let give_back = self.attempt.give_back.clone();
        // Well below the lease, so that there is time left to say how it ended.
        let patience = context.settings.lease() / 2;
        let fetching = async {
            match &committed {
                // By nothing but its identifier: a name may have come to mean another object.
                Some(key) => context.dsm.fetch_exact(&key.connection, &key.key_id, kind).await,
                None => context.dsm.fetch(reference, kind).await,
            }
        };
        let fetched = tokio::select! {
            fetched = fetching => fetched,
            () = tokio::time::sleep(patience) => {
                let message = "the KMIP server took longer than half a lease";
                return self.retry(Class::Transient, "dsm", message, None);
            }
            () = give_back.cancelled() => {
                self.not_stopping()?;
                return Err(None);
            }
        };
        let fetched = match fetched {
            Ok(fetched) => fetched,
            Err(error) => {
                let code = FailureCode::parse(error.code()).unwrap_or(FailureCode::SourceKeyDamaged);
                return self.not_fetched(error.retry(), code, &error.to_string());
            }
        };
        let fingerprint = context.keyring.fingerprint(&fetched.key);
        let key = match committed {
            Some(key) if key.fingerprint != fingerprint => {
                let message = format!(
                    "the KMIP server {} now holds other bytes as {}; a job imports what it has chosen or nothing",
                    key.connection, key.key_id
                );
                return self.not_fetched(None, FailureCode::SourceKeyChanged, &message);
            }
            Some(key) => key,
            None => DsmChoice {
                connection: fetched.connection,
                key_id: fetched.unique_identifier,
                key_name: fetched.name,
                fingerprint,
            },
        };
        self.fetched = Some(fetched.key);
        Ok(SourceKey::Dsm(key))
    }

    /// Tries again, or ends the job. One whose import may have taken effect is not ended by what a KMIP server says: only
    /// the same bytes settle it, and whoever keeps the server may give them again before the job's time is over.
    fn not_fetched<T>(&mut self, class: Option<Class>, code: FailureCode, message: &str) -> Or<T> {
        match class {
            Some(class) => self.retry(class, "dsm", message, None),
            None if self.in_doubt => self.retry(Class::Credentials, "dsm", message, None),
            None => self.fail(code, message),
        }
    }

    /// Whether AWS shows the chosen pair. Compared by fingerprint: nothing is opened or fetched for that.
    pub(super) fn is_own_public_key(&self, kind: KeyKind, shown: &[u8]) -> bool {
        let shown = self.attempt.context.keyring.fingerprint_of_public_key(kind, shown);
        self.source_key.as_ref().is_some_and(|key| *key.fingerprint() == shown)
    }

    /// Uses the bytes of the chosen key off the async threads. They are gone when `work` returns.
    pub(super) async fn with_plain<T: Send + 'static>(
        &mut self,
        key: SourceKey,
        work: impl FnOnce(&PlainKey) -> T + Send + 'static,
    ) -> Or<T> {
        match (key, self.fetched.take()) {
            (SourceKey::Local(key), _) => self.with_opened(key, work).await,
            (SourceKey::Dsm(_), Some(fetched)) => {
                self.compute(Arc::clone(&self.attempt.computing), move || work(&fetched)).await
            }
            // It was used already: the next attempt fetches it again.
            (SourceKey::Dsm(_), None) => self.retry(Class::Immediate, "dsm", "the key must be fetched again", None),
        }
    }

    /// Opens a sealed key and uses it off the async threads.
    async fn with_opened<T: Send + 'static>(
        &mut self,
        key: SealedKey,
        work: impl FnOnce(&PlainKey) -> T + Send + 'static,
    ) -> Or<T> {
        let context = Arc::clone(&self.attempt.context);
        let done: Result<T, OpenError> = self
            .compute(Arc::clone(&self.attempt.computing), move || key.open(&context.keyring).map(|key| work(&key)))
            .await?;
        match done {
            Ok(done) => Ok(done),
            Err(error) => self.fail(FailureCode::SourceKeyDamaged, &error.to_string()),
        }
    }

    /// Off the async threads, and no more at once than there are permits.
    pub(super) async fn compute<T: Send + 'static>(
        &mut self,
        permits: Arc<Semaphore>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Or<T> {
        let give_back = self.attempt.give_back.clone();
        let permit = tokio::select! {
            permit = permits.acquire_owned() => permit,
            () = give_back.cancelled() => {
                self.not_stopping()?;
                return Err(None);
            }
        };
        let done = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work()
        })
        .await;
        match done {
            Ok(done) => Ok(done),
            Err(_) => self.retry(Class::Transient, "compute", "a computation broke off", None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The codes stand in two rooms, of which neither may import the other.
    #[test]
    fn every_code_of_the_source_is_a_failure_code() {
        let files = [include_str!("../../source/fault.rs"), include_str!("../../source/dsm/error.rs")];
        let mut seen = 0;
        for line in files.iter().flat_map(|text| text.lines()) {
            let Some((_, code)) = line.split_once(" => \"") else { continue };
            let code = code.split('"').next().unwrap();
            if ["material_", "source_key_", "dsm_"].iter().any(|start| code.starts_with(start)) {
                assert!(FailureCode::parse(code).is_some(), "{code}");
                seen += 1;
            }
        }
        assert!(seen > 30, "{seen}");
    }
}
