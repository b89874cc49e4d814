//! Everything the double knows, behind one lock, and the clock it lives by.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::body::Bytes;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::sync::{Notify, oneshot};

use crate::faults::Faults;
use crate::imports::RepeatedNew;
use crate::journal::{Entry, Journal};
use crate::kinds::{Millis, Operation};
use crate::quotas::Quotas;
use crate::roles::Roles;
use crate::table::Keys;
use crate::tokens::Tokens;

/// The double as a whole.
pub struct World {
    /// Who may call: by access key.
    pub credentials: HashMap<String, Credential>,
    /// Whether a first import is left wrapped until somebody looks at it.
    pub lazy: bool,
    /// How far a signature's time may be off.
    pub signature_life: time::Duration,
    /// Woken by every new journal entry.
    pub grown: Arc<Notify>,
    /// Woken when a call is held, or a late effect has happened.
    pub moved: Notify,
    offset: AtomicI64,
    latency: AtomicU64,
    state: Mutex<State>,
}

/// A secret and the account it opens.
pub struct Credential {
    /// The secret access key.
    pub secret: String,
    /// Who signs with it.
    pub principal: Principal,
}

/// An authenticated caller.
#[derive(Clone, Debug)]
pub struct Principal {
    /// Id of the access key.
    pub access_key: Arc<str>,
    /// Account of the access key, or of the role.
    pub account: Arc<str>,
    /// The session of a role, as an ARN; the access key is then that of whoever assumed it.
    pub session: Option<Arc<str>>,
}

impl Principal {
    /// As AWS names the caller.
    pub fn arn(&self) -> String {
        match &self.session {
            Some(session) => session.to_string(),
            None => format!("arn:aws:iam::{}:user/{}", self.account, self.access_key),
        }
    }
}

/// What changes. Every critical section is short; no private operation of RSA happens inside.
pub struct State {
    /// All keys.
    pub keys: Keys,
    /// All import tokens.
    pub tokens: Tokens,
    /// What has happened.
    pub journal: Journal,
    /// What shall go wrong.
    pub faults: Faults,
    /// Request quotas.
    pub quotas: Quotas,
    /// What STS knows.
    pub roles: Roles,
    /// Choices between behaviours that are UNVERIFIED for AWS.
    pub options: Options,
    /// Calls that wait for their release.
    pub held: Vec<Held>,
    /// Calls that take effect later. One that is taking effect right now has no call any more.
    pub late: Vec<Late>,
    regions: HashSet<Arc<str>>,
    last_id: u64,
}

/// Choices between behaviours that are UNVERIFIED for AWS, and how late it is seen what has happened.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Whether a set of public key and token is good for one successful import only.
    pub single_use_tokens: bool,
    /// Whether `RSA_AES_KEY_WRAP_*` is accepted for symmetric and HMAC keys, which AWS's table denies.
    pub hybrid_wrap_for_symmetric: bool,
    /// What is answered to a repeated import of pending material.
    pub repeated_new_material: RepeatedNew,
    /// Whether the first import into a replica must say that the material exists already.
    pub replica_needs_existing: bool,
    /// How long nobody but the control interface knows of a new key.
    pub creation_lag_ms: Millis,
    /// How long `DescribeKey`, `ListKeyRotations` and `GetPublicKey` show the state before a key's last change. All
    /// run by the double's own clock.
    pub change_lag_ms: Millis,
    /// How long a rotation takes after `RotateKeyOnDemand` has answered. AWS gives no figure.
    pub rotation_ms: Millis,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            single_use_tokens: true,
            hybrid_wrap_for_symmetric: false,
            repeated_new_material: RepeatedNew::default(),
            replica_needs_existing: true,
            creation_lag_ms: 0,
            change_lag_ms: 0,
            rotation_ms: 0,
        }
    }
}

/// A call that waits for its release.
pub struct Held {
    /// Number, in the order of arrival.
    pub id: u64,
    /// What it will do.
    pub call: Call,
    /// Dropped or used to let it go on.
    pub release: oneshot::Sender<()>,
}

/// A call that takes effect later.
pub struct Late {
    /// Number, in the order of arrival.
    pub id: u64,
    /// What it will do; gone while it is doing so.
    pub call: Option<Call>,
}

/// An authenticated call on its way through the double.
#[derive(Clone)]
pub struct Call {
    /// Which operation.
    pub operation: Operation,
    /// The request.
    pub body: Bytes,
    /// Who calls.
    pub principal: Principal,
    /// In which Region.
    pub region: Arc<str>,
    /// The key or role that it names, as an ARN, whether or not it exists.
    pub key_arn: Option<Arc<str>>,
    /// The fault it suffers.
    pub fault: Option<&'static str>,
    /// Whether it takes effect after its client was left without an answer.
    pub late: bool,
    /// Set once the client has gone away.
    pub gone: Arc<AtomicBool>,
}

impl World {
    /// A world without keys.
    pub fn new(
        credentials: HashMap<String, Credential>,
        lazy: bool,
        signature_life: time::Duration,
        latency_ms: u64,
        quotas: bool,
        journal_limit: usize,
    ) -> Self {
        let grown = Arc::new(Notify::new());
        Self {
            credentials,
            lazy,
            signature_life,
            moved: Notify::new(),
            offset: AtomicI64::new(0),
            latency: AtomicU64::new(latency_ms),
            state: Mutex::new(State {
                keys: Keys::default(),
                tokens: Tokens::default(),
                journal: Journal::new(journal_limit, Arc::clone(&grown)),
                faults: Faults::default(),
                quotas: Quotas::new(quotas),
                roles: Roles::default(),
                options: Options::default(),
                held: Vec::new(),
                late: Vec::new(),
                regions: HashSet::new(),
                last_id: 0,
            }),
            grown,
        }
    }

    /// The state, locked. Never held across an await or an RSA operation.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The double's own time.
    pub fn now(&self) -> Millis {
        let real = OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000;
        i64::try_from(real).unwrap_or(i64::MAX).saturating_add(self.offset.load(Ordering::Relaxed))
    }

    /// Moves the double's own time.
    pub fn advance(&self, by: Millis) {
        self.offset.fetch_add(by, Ordering::Relaxed);
    }

    /// How long every answer takes at least.
    pub fn latency_ms(&self) -> u64 {
        self.latency.load(Ordering::Relaxed)
    }

    /// Sets how long every answer takes at least.
    pub fn set_latency_ms(&self, ms: u64) {
        self.latency.store(ms, Ordering::Relaxed);
    }
}

impl State {
    /// One shared string per Region.
    pub fn region(&mut self, name: &str) -> Arc<str> {
        if let Some(known) = self.regions.get(name) {
            return Arc::clone(known);
        }
        let region: Arc<str> = name.into();
        self.regions.insert(Arc::clone(&region));
        region
    }

    /// A number for a held or late call.
    pub fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }
}

impl Call {
    /// The journal's line for this call.
    pub fn entry(&self, at: Millis, outcome: impl Into<std::borrow::Cow<'static, str>>) -> Entry {
        Entry {
            at,
            operation: self.operation.name(),
            key_arn: self.key_arn.clone(),
            account: Some(Arc::clone(&self.principal.account)),
            region: Some(Arc::clone(&self.region)),
            access_key: Some(Arc::clone(&self.principal.access_key)),
            session: self.principal.session.clone(),
            outcome: outcome.into(),
            fault: self.fault,
            late: self.late || self.gone.load(Ordering::Acquire),
            effect: None,
        }
    }
}
