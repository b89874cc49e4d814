//! Performs one AWS call truthfully: what was answered, what may have happened without an answer.
//!
//! One owner of retries: the SDK makes every call once, and what follows is decided by the worker and held in
//! Postgres.

mod accounts;
mod call_error;
mod description;
mod endpoint;
mod guard;
mod held;
mod look;
mod session;
mod taken;
#[cfg(feature = "failpoints")]
mod unread;

pub use accounts::{Account, Role};
pub use call_error::{CallError, ErrorKind};
pub use description::{KeyDescription, RegionRole, Regions};
pub use endpoint::{Encryption, PlainEndpoint};
pub use guard::LeaseGuard;
pub use held::{HeldMaterial, MaterialState};
pub use look::{Look, Whose};

use crate::job::{Expiry, ImportParameters, KeyArn, Wrapping};
use crate::telemetry::{AwsCalls, Metrics};
use accounts::Accounts;
use aws_config::{BehaviorVersion, SdkConfig};
use aws_sdk_kms::Client;
use aws_sdk_kms::config::timeout::TimeoutConfig;
use aws_sdk_kms::operation::RequestId as _;
use aws_sdk_kms::primitives::{Blob, DateTime};
use aws_sdk_kms::types::{AlgorithmSpec, ExpirationModelType, ImportType, IncludeKeyMaterial, WrappingKeySpec};
use futures_util::future::join_all;
use guard::{Departure, Gate};
use session::Session;
use std::sync::Arc;
use std::time::{Duration, Instant};
use time::OffsetDateTime;

/// How a symmetric key's material is to be taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MaterialRole {
    /// The key's first material, or a key whose materials have no ids. AWS decides by what the key holds
    /// and never opens a pending rotation by surprise.
    First,
    /// New material beside what a symmetric key holds. It waits for its rotation; a key has one such at most.
    New,
    /// Material that the key is tied to. With an id AWS compares and refuses any other; without one, on a replica
    /// that has not been told its primary's, AWS compares with all of them.
    Existing(Option<String>),
}

/// One `ImportKeyMaterial`. Not `Debug`: it holds the token.
pub struct ImportCall<'a> {
    /// From the same set as the key that wrapped.
    pub import_token: &'a [u8],
    /// The wrapped material.
    pub wrapped: Vec<u8>,
    /// The material's end of life.
    pub expiry: Expiry,
    /// First, new or existing.
    pub role: MaterialRole,
    /// Symmetric keys only.
    pub description: Option<String>,
}

/// What AWS said to an import.
#[derive(Clone, Debug)]
pub struct Imported {
    /// Symmetric keys only.
    pub key_material_id: Option<String>,
    /// AWS's id of the call.
    pub aws_request_id: Option<String>,
}

/// What AWS said to a deletion.
#[derive(Clone, Debug)]
pub struct Deleted {
    /// Symmetric keys only.
    pub key_material_id: Option<String>,
    /// AWS's id of the call.
    pub aws_request_id: Option<String>,
}

words! {
    /// The calls that are made.
    pub(crate) Call {
        /// Read-only.
        DescribeKey = "DescribeKey",
        /// Read-only, with a quota of 1/s.
        GetParametersForImport = "GetParametersForImport",
        /// Changes the key.
        ImportKeyMaterial = "ImportKeyMaterial",
        /// Changes the key.
        DeleteImportedKeyMaterial = "DeleteImportedKeyMaterial",
        /// Changes the key.
        RotateKeyOnDemand = "RotateKeyOnDemand",
        /// Read-only.
        GetPublicKey = "GetPublicKey",
        /// Read-only.
        ListKeyRotations = "ListKeyRotations",
        /// Of STS: the credentials of an account's role.
        AssumeRole = "AssumeRole",
        /// Of STS, and not of a worker: whose the credentials are.
        GetCallerIdentity = "GetCallerIdentity",
    }
}

/// Sends a call through the lease's gate. A macro: each of the SDK's builders is a type of its own.
macro_rules! send {
    ($kms:expr, $operation:expr, $request:expr, $guard:expr) => {{
        let (gate, departure) = $kms.gate($guard);
        let request = $request.customize().interceptor(gate);
        #[cfg(feature = "failpoints")]
        let request = request.interceptor(unread::Unread($operation.as_str()));
        let begun = Instant::now();
        let answer = request.send().await;
        if departure.happened() {
            $kms.calls.took($operation, begun);
        }
        answer.map_err(|error| $kms.judged(CallError::of($operation.as_str(), &error, &departure), &departure))
    }};
}

/// Clients for the configured accounts and Regions.
#[derive(Debug)]
pub struct Kms {
    accounts: Accounts,
    attempt_timeout: Duration,
    calls: AwsCalls<Call, ErrorKind>,
}

impl Kms {
    /// Connects nowhere. Credentials and endpoints come from the SDK's own chain (`AWS_ENDPOINT_URL_KMS`, profiles,
    /// roles), but for what is said of an account. An error where they lead over plain http to another machine.
    pub async fn connect(
        accounts: Vec<Account>,
        attempt_timeout: Duration,
        encryption: Encryption,
        metrics: &Metrics,
    ) -> Result<Self, PlainEndpoint> {
        let shared = aws_config::defaults(BehaviorVersion::v2026_01_12()).load().await;
        endpoint::judge(&shared, encryption)?;
        Ok(Self::with_config(&shared, accounts, attempt_timeout, metrics))
    }

    fn with_config(shared: &SdkConfig, accounts: Vec<Account>, attempt_timeout: Duration, metrics: &Metrics) -> Self {
        let calls = AwsCalls::of(metrics);
        Self { accounts: Accounts::new(shared, accounts, attempt_timeout, &calls), attempt_timeout, calls }
    }

    /// Has the roles assumed in the background, so that first jobs need not wait for it, and what is wrong with a role
    /// is told at the start.
    pub fn warm(&self) {
        const AT_ONCE: usize = 8;
        let mut sessions: Vec<_> = self.accounts.sessions().cloned().collect();
        // An account has one, and several Regions.
        sessions.sort_unstable_by_key(Arc::as_ptr);
        sessions.dedup_by(|one, other| Arc::ptr_eq(one, other));
        tokio::spawn(async move {
            for some in sessions.chunks(AT_ONCE) {
                // Each tells of its own failure.
                drop(join_all(some.iter().map(Session::credentials)).await);
            }
        });
    }

    /// `DescribeKey`. Read-only.
    pub async fn describe(&self, key: &KeyArn, guard: &LeaseGuard) -> Result<KeyDescription, CallError> {
        const OPERATION: Call = Call::DescribeKey;
        let request = self.client(key, OPERATION)?.describe_key().key_id(key.to_string());
        let answer = send!(self, OPERATION, request, guard);
        self.counted(
            OPERATION,
            answer.and_then(|answer| {
                let metadata =
                    answer.key_metadata.ok_or_else(|| CallError::incomplete(OPERATION.as_str(), "KeyMetadata"))?;
                KeyDescription::of(&metadata, key)
                    .map_err(|name| CallError::incomplete(OPERATION.as_str(), &format!("readable {name}")))
            }),
        )
    }

    /// `GetParametersForImport`. Changes nothing, but its quota is 1/s for an account and Region.
    pub async fn parameters(
        &self,
        key: &KeyArn,
        wrapping: Wrapping,
        guard: &LeaseGuard,
    ) -> Result<ImportParameters, CallError> {
        const OPERATION: Call = Call::GetParametersForImport;
        let request = self
            .client(key, OPERATION)?
            .get_parameters_for_import()
            .key_id(key.to_string())
            .wrapping_algorithm(AlgorithmSpec::from(wrapping.algorithm.as_str()))
            .wrapping_key_spec(WrappingKeySpec::from(wrapping.key_spec.as_str()));
        let answer = send!(self, OPERATION, request, guard);
        self.counted(
            OPERATION,
            answer.and_then(|answer| {
                let aws_request_id = answer.request_id().and_then(taken::word);
                let part = |name| CallError::incomplete(OPERATION.as_str(), name);
                Ok(ImportParameters {
                    region: key.region().to_owned(),
                    wrapping,
                    public_key: answer.public_key.and_then(taken::bytes).ok_or_else(|| part("PublicKey"))?,
                    import_token: answer.import_token.and_then(taken::bytes).ok_or_else(|| part("ImportToken"))?,
                    valid_to: answer
                        .parameters_valid_to
                        .and_then(|at| OffsetDateTime::from_unix_timestamp(at.secs()).ok())
                        .ok_or_else(|| part("ParametersValidTo"))?,
                    aws_request_id,
                })
            }),
        )
    }

    /// `ImportKeyMaterial`. An error whose [`ErrorKind::may_have_taken_effect`] holds leaves the outcome open.
    pub async fn import(&self, key: &KeyArn, call: ImportCall<'_>, guard: &LeaseGuard) -> Result<Imported, CallError> {
        const OPERATION: Call = Call::ImportKeyMaterial;
        let request = self
            .client(key, OPERATION)?
            .import_key_material()
            .key_id(key.to_string())
            .import_token(Blob::new(call.import_token))
            .encrypted_key_material(Blob::new(call.wrapped));
        // Always explicit: AWS's default is "expires", and a condition key sees only what is sent.
        let request = match call.expiry {
            Expiry::Never => request.expiration_model(ExpirationModelType::KeyMaterialDoesNotExpire),
            Expiry::At(at) => request
                .expiration_model(ExpirationModelType::KeyMaterialExpires)
                .valid_to(DateTime::from_secs(at.unix_timestamp())),
        };
        let request = match call.role {
            MaterialRole::First => request,
            MaterialRole::New => request.import_type(ImportType::NewKeyMaterial),
            MaterialRole::Existing(id) => request.import_type(ImportType::ExistingKeyMaterial).set_key_material_id(id),
        };
        let request = request.set_key_material_description(call.description);
        let answer = send!(self, OPERATION, request, guard);
        self.counted(
            OPERATION,
            answer.and_then(|answer| {
                Ok(Imported {
                    aws_request_id: answer.request_id().and_then(taken::word),
                    key_material_id: named_material(OPERATION, answer.key_material_id())?,
                })
            }),
        )
    }

    /// `DeleteImportedKeyMaterial`. An error whose [`ErrorKind::may_have_taken_effect`] holds leaves the outcome open.
    ///
    /// AWS documents no effect where there is no material; for one that is named by id that is UNVERIFIED.
    pub async fn delete(
        &self,
        key: &KeyArn,
        material_id: Option<&str>,
        guard: &LeaseGuard,
    ) -> Result<Deleted, CallError> {
        const OPERATION: Call = Call::DeleteImportedKeyMaterial;
        let request = self
            .client(key, OPERATION)?
            .delete_imported_key_material()
            .key_id(key.to_string())
            .set_key_material_id(material_id.map(str::to_owned));
        let answer = send!(self, OPERATION, request, guard);
        self.counted(
            OPERATION,
            answer.and_then(|answer| {
                Ok(Deleted {
                    aws_request_id: answer.request_id().and_then(taken::word),
                    key_material_id: named_material(OPERATION, answer.key_material_id())?,
                })
            }),
        )
    }

    /// `RotateKeyOnDemand`: the material that waits comes into force, some time after AWS has answered. Gives AWS's id of
    /// the call. An error whose [`ErrorKind::may_have_taken_effect`] holds leaves the outcome open.
    ///
    /// It does not name the material: what waits when it arrives is what it means.
    pub async fn rotate(&self, key: &KeyArn, guard: &LeaseGuard) -> Result<Option<String>, CallError> {
        const OPERATION: Call = Call::RotateKeyOnDemand;
        let request = self.client(key, OPERATION)?.rotate_key_on_demand().key_id(key.to_string());
        let answer = send!(self, OPERATION, request, guard);
        self.counted(OPERATION, answer.map(|answer| answer.request_id().and_then(taken::word)))
    }

    /// `GetPublicKey`: the DER `SubjectPublicKeyInfo` of a pair. Read-only.
    pub async fn public_key(&self, key: &KeyArn, guard: &LeaseGuard) -> Result<Vec<u8>, CallError> {
        const OPERATION: Call = Call::GetPublicKey;
        let request = self.client(key, OPERATION)?.get_public_key().key_id(key.to_string());
        let answer = send!(self, OPERATION, request, guard);
        self.counted(
            OPERATION,
            answer.and_then(|answer| {
                answer
                    .public_key
                    .and_then(taken::bytes)
                    .ok_or_else(|| CallError::incomplete(OPERATION.as_str(), "PublicKey"))
            }),
        )
    }

    /// `ListKeyRotations`: every material that a symmetric key is tied to, there or missing, and the one that waits
    /// for its rotation. Read-only.
    pub async fn materials(&self, key: &KeyArn, guard: &LeaseGuard) -> Result<Vec<HeldMaterial>, CallError> {
        const OPERATION: Call = Call::ListKeyRotations;
        // A key has at most 27: the first, 25 rotations, one that waits.
        const MOST_PAGES: usize = 10;
        const MOST: usize = 256;
        let client = self.client(key, OPERATION)?;
        let (mut found, mut marker) = (Vec::new(), None);
        for _ in 0..MOST_PAGES {
            let request = client
                .list_key_rotations()
                .key_id(key.to_string())
                .include_key_material(IncludeKeyMaterial::AllKeyMaterial)
                .set_marker(marker);
            let answer = send!(self, OPERATION, request, guard);
            let page = self.counted(OPERATION, answer)?;
            for entry in page.rotations() {
                // One that cannot be read must not pass for one that is missing.
                found.push(
                    HeldMaterial::of(entry)
                        .ok_or_else(|| CallError::incomplete(OPERATION.as_str(), "material's id and state"))?,
                );
            }
            if found.len() > MOST {
                break;
            }
            marker = page.next_marker;
            if marker.is_none() {
                return Ok(found);
            }
        }
        Err(CallError::incomplete(OPERATION.as_str(), "end of the list"))
    }

    fn client(&self, key: &KeyArn, operation: Call) -> Result<&Client, CallError> {
        self.accounts.client(key).ok_or_else(|| CallError::no_target(operation.as_str(), key.region()))
    }

    fn counted<T>(&self, operation: Call, outcome: Result<T, CallError>) -> Result<T, CallError> {
        self.calls.ended(operation, outcome.as_ref().err().map(|error| error.kind));
        outcome
    }

    /// Credentials of a role that KMS no longer takes are asked for anew: a matter of a moment, and of nobody's hands.
    fn judged(&self, error: CallError, departure: &Departure) -> CallError {
        let is_over = error.kind == ErrorKind::Credentials && error.says_credentials_are_over();
        let signer = departure.signer().filter(|_| is_over);
        let is_session = signer.is_some_and(|key| self.accounts.sessions().any(|session| session.distrusts(key)));
        if is_session { CallError { kind: ErrorKind::NoSession, ..error } } else { error }
    }

    /// A call leaves only when the lease outlives its time-out, so that its answer falls into the lease.
    fn gate(&self, guard: &LeaseGuard) -> (Gate, Departure) {
        Gate::new(guard.clone(), self.attempt_timeout)
    }
}

/// The material that an answer names, if it names one: that of an asymmetric key has no id.
fn named_material(operation: Call, id: Option<&str>) -> Result<Option<String>, CallError> {
    let unreadable = || CallError::incomplete(operation.as_str(), "readable KeyMaterialId");
    id.map(|id| taken::material_id(id).ok_or_else(unreadable)).transpose()
}

fn timeouts(attempt: Duration) -> TimeoutConfig {
    TimeoutConfig::builder()
        .connect_timeout(attempt.min(Duration::from_millis(3_100)))
        .operation_attempt_timeout(attempt)
        .build()
}

#[cfg(test)]
mod tests;
