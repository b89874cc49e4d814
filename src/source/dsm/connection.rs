//! One named connection: finds an object by identifier or name, in as few messages as can be, and judges it.

use super::answers::{Answer, Attributes, Object, Refusal, Response, described, located};
use super::identity::Identity;
use super::key_block::{self, KeyFault};
use super::messages::Ask;
use super::names::Names;
use super::pool::{Answered, Pool};
use super::session::{Endpoint, Setup, answers, given, protocol};
use super::ttlv::Structure;
use super::{DsmError, FetchedKey};
use crate::config::{ConfigError, DsmConnection};
use crate::job::KeyKind;
use crate::source::PlainKey;
use crate::telemetry::Metrics;
use rustls::pki_types::ServerName;
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Candidates that an ambiguous name is refused with.
const MOST_CANDIDATES: usize = 16;

/// A named connection.
pub(super) struct Connection {
    pub(super) pool: Pool,
    names: Names,
    /// Pairs whose arithmetic is done at a time: as many as answers can come in. Its threads are shared with everything
    /// else that blocks.
    reading: Arc<Semaphore>,
}

/// An object with its bytes, as the server gave it.
pub(super) struct Found {
    id: String,
    attributes: Attributes,
    response: Response,
    name: Option<String>,
    /// The operations that the response answers.
    batch: Batch,
}

/// What is known of a reference when its name is looked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Known {
    Nothing,
    /// That it is nothing's identifier.
    NoIdentifier,
}

/// Which operations went in one message.
#[derive(Clone, Copy)]
enum Batch {
    LocateAttributesKey,
    AttributesKey,
    Key,
}

impl Batch {
    fn asks<'a>(self, name: &'a str, id: &'a str) -> Vec<Ask<'a>> {
        let all = [locate(name), Ask::GetAttributes(id), Ask::Get(id)];
        let first = match self {
            Self::LocateAttributesKey => 0,
            Self::AttributesKey => 1,
            Self::Key => 2,
        };
        all.into_iter().skip(first).collect()
    }
}

fn locate(name: &str) -> Ask<'_> {
    // One more than is shown, to know whether there are more.
    Ask::Locate { name: Some(name), at_most: 17 }
}

impl Connection {
    pub(super) fn new(name: &str, settings: &DsmConnection, metrics: &Metrics) -> Result<Self, ConfigError> {
        let identity = Arc::new(Identity::new(name, settings)?);
        let invalid =
            |setting: &str, expected| ConfigError::Invalid { name: format!("dsm.{name}.{setting}").into(), expected };
        let addresses = settings.addresses().ok_or_else(|| invalid("servers", "host:port each"))?;
        let endpoints = addresses.into_iter().map(|(host, port)| {
            let (setting, name) = match &settings.server_name {
                Some(name) => ("server_name", name.clone()),
                None => ("servers", host.clone()),
            };
            let name = ServerName::try_from(name).map_err(|_| invalid(setting, "a DNS name or an IP address"))?;
            Ok(Endpoint { host, port, name })
        });
        let setup = Setup {
            identity,
            protocol: settings.protocol,
            connect_timeout: settings.connect_timeout(),
            request_timeout: settings.request_timeout(),
        };
        let endpoints = endpoints.collect::<Result<Vec<_>, ConfigError>>()?;
        let pool = Pool::new(name, endpoints, setup, settings.max_connections, metrics);
        Ok(Self { pool, names: Names::default(), reading: Arc::new(Semaphore::new(settings.max_connections)) })
    }

    pub(super) fn name(&self) -> String {
        self.pool.name().to_owned()
    }

    /// The object with a unique identifier, with what is known about it. `key` is what was asked for, for sentences.
    ///
    /// Both come in one message, unless the server does not answer several operations at once.
    pub(super) async fn by_identifier(&self, key: &str, id: &str) -> Result<Option<Found>, DsmError> {
        let asks = Batch::AttributesKey.asks("", id);
        let answered = self.pool.exchange(&asks).await?;
        let mut both = self.answers(&answered, &asks)?.into_iter();
        let attributes = match (both.next().flatten(), both.next().flatten()) {
            (Some(Ok(known)), Some(Ok(_))) => {
                let attributes = self.attributes(key, id, known)?;
                return Ok(Some(Found {
                    id: id.to_owned(),
                    attributes,
                    response: answered.response,
                    name: None,
                    batch: Batch::AttributesKey,
                }));
            }
            (Some(Ok(_)), Some(Err(refusal))) => return self.none_or(key, &refusal),
            (Some(Ok(known)), None) => self.attributes(key, id, known)?,
            (Some(Err(refusal)), _) if !refusal.is_of_message() => return self.none_or(key, &refusal),
            _ => {
                let asks = [Ask::GetAttributes(id)];
                let answered = self.pool.exchange(&asks).await?;
                match self.answer(&answered, &asks)? {
                    Ok(known) => self.attributes(key, id, known)?,
                    Err(refusal) if refusal.is_unsupported_operation() => Attributes::default(),
                    Err(refusal) => return self.none_or(key, &refusal),
                }
            }
        };
        let asks = [Ask::Get(id)];
        let answered = self.pool.exchange(&asks).await?;
        if let Err(refusal) = self.answer(&answered, &asks)? {
            return self.none_or(key, &refusal);
        }
        let response = answered.response;
        Ok(Some(Found { id: id.to_owned(), attributes, response, name: None, batch: Batch::Key }))
    }

    /// The one object that has a name.
    ///
    /// Which object had it last is remembered, and asked for in the message that asks who has the name now: the server's
    /// answer decides, and a warm fetch is one round trip.
    pub(super) async fn by_name(&self, name: &str, known: Known) -> Result<Option<Found>, DsmError> {
        if let Some(id) = self.names.get(name) {
            let asks = Batch::LocateAttributesKey.asks(name, &id);
            let answered = self.pool.exchange(&asks).await?;
            let mut all = self.answers(&answered, &asks)?.into_iter().map(Option::transpose);
            if let (Some(Ok(Some(found))), Some(Ok(Some(attributes))), Some(Ok(Some(_)))) =
                (all.next(), all.next(), all.next())
                && self.located(&answered, found)? == [id.as_str()]
            {
                let attributes = self.attributes(name, &id, attributes)?;
                let (response, batch) = (answered.response, Batch::LocateAttributesKey);
                return Ok(Some(Found { id, attributes, response, name: Some(name.to_owned()), batch }));
            }
            self.names.forget(name);
        }
        let Some(id) = self.locate(name).await? else { return Ok(None) };
        if known == Known::Nothing && id != name && self.is_identifier(name).await? {
            return Err(DsmError::KeyAmbiguous {
                connection: self.name(),
                key: name.to_owned(),
                candidates: vec![id, name.to_owned()],
                more: false,
            });
        }
        let found = self.by_identifier(name, &id).await?;
        if found.is_some() {
            self.names.remember(name, &id);
        }
        Ok(found.map(|found| Found { name: Some(name.to_owned()), ..found }))
    }

    /// Whether an object is known by that identifier. One whose attributes the client does not see is not: it could not be
    /// meant either.
    async fn is_identifier(&self, id: &str) -> Result<bool, DsmError> {
        let asks = [Ask::GetAttributes(id)];
        let answered = self.pool.exchange(&asks).await?;
        let answer = self.answer(&answered, &asks)?;
        // Some servers take names for identifiers: they say whose attributes these are.
        Ok(answer.is_ok_and(|known| described(known).is_none_or(|described| described == id)))
    }

    /// The unique identifier of the one object that has a name.
    async fn locate(&self, name: &str) -> Result<Option<String>, DsmError> {
        let asks = [locate(name)];
        let answered = self.pool.exchange(&asks).await?;
        let found = match self.answer(&answered, &asks)? {
            Ok(found) => self.located(&answered, found)?,
            Err(refusal) => return self.none_or(name, &refusal),
        };
        match found.as_slice() {
            [] => Ok(None),
            [id] => Ok(Some((*id).to_owned())),
            several => Err(DsmError::KeyAmbiguous {
                connection: self.name(),
                key: name.to_owned(),
                candidates: several.iter().take(MOST_CANDIDATES).map(|id| (*id).to_owned()).collect(),
                more: several.len() > MOST_CANDIDATES,
            }),
        }
    }

    fn located<'a>(&self, answered: &Answered, found: Structure<'a>) -> Result<Vec<&'a str>, DsmError> {
        located(found).map_err(|fault| self.pool.fault(answered.server, &protocol(&fault)))
    }

    /// What is known about the object that was asked about, and no other.
    fn attributes(&self, key: &str, id: &str, known: Structure<'_>) -> Result<Attributes, DsmError> {
        if described(known).is_some_and(|described| described != id) {
            return Err(DsmError::Damaged {
                connection: self.name(),
                key: key.to_owned(),
                reason: "the server described another object than was asked for",
            });
        }
        Ok(Attributes::read(known))
    }

    /// Judges what was found, and reads the key.
    pub(super) async fn open(&self, key: &str, kind: KeyKind, found: Option<Found>) -> Result<FetchedKey, DsmError> {
        let Some(found) = found else {
            return Err(DsmError::KeyUnknown { connection: self.name(), key: key.to_owned() });
        };
        if let Some(state) = found.attributes.state.and_then(key_block::unusable_state) {
            return Err(self.wrong_state(key, state));
        }
        if found.attributes.state.is_none() {
            tracing::debug!(
                dsm.connection = self.pool.name(), dsm.key = %found.id,
                "the dsm server says no state of the key: it is taken as it is"
            );
        }
        let (id, name) = (found.id.clone(), found.name.clone().or_else(|| found.attributes.name.clone()));
        let read = move || found.read(kind);
        // The arithmetic of a large pair takes milliseconds.
        let read = if kind.is_pair() {
            // Nobody closes it. It goes with the work: that does not end when nobody waits for it any more.
            let permit = Arc::clone(&self.reading).acquire_owned().await.ok();
            let read = move || {
                let _permit = permit;
                read()
            };
            tokio::task::spawn_blocking(read).await
        } else {
            Ok(read())
        };
        // A panic inside a crate on a hostile number: the key is no key.
        let read = read.unwrap_or(Err(KeyFault::Malformed("its numbers could not be computed with")));
        let key = read.map_err(|fault| self.fault(key, kind, fault))?;
        Ok(FetchedKey { connection: self.name(), unique_identifier: id, name, key })
    }

    fn answers<'a>(&self, answered: &'a Answered, asks: &[Ask<'_>]) -> Result<Vec<Answer<'a>>, DsmError> {
        answers(&answered.response, asks).map_err(|error| self.pool.fault(answered.server, &error))
    }

    fn answer<'a>(
        &self,
        answered: &'a Answered,
        asks: &[Ask<'_>; 1],
    ) -> Result<Result<Structure<'a>, Refusal>, DsmError> {
        let answer = self.answers(answered, asks)?.pop().flatten();
        given(answer).map_err(|error| self.pool.fault(answered.server, &error))
    }

    /// Nothing, where the server says that there is nothing; else what its refusal means.
    fn none_or<T>(&self, key: &str, refusal: &Refusal) -> Result<Option<T>, DsmError> {
        let (connection, reason) = (self.name(), refusal.to_string());
        if refusal.is_not_found() {
            return Ok(None);
        }
        if let Some(state) = refusal.wrong_state() {
            return Err(self.wrong_state(key, state));
        }
        let key = key.to_owned();
        Err(if refusal.is_unauthenticated() {
            DsmError::Unauthenticated { connection, reason }
        } else if refusal.is_denied() {
            DsmError::Denied { connection, key, reason }
        } else if refusal.is_withheld() {
            DsmError::NotExportable { connection, key, reason }
        } else if refusal.is_passing() {
            DsmError::Unavailable { connection, reason }
        } else {
            DsmError::Protocol { connection, reason }
        })
    }

    fn wrong_state(&self, key: &str, state: &str) -> DsmError {
        DsmError::WrongState { connection: self.name(), key: key.to_owned(), state: state.to_owned() }
    }

    fn fault(&self, key: &str, kind: KeyKind, fault: KeyFault) -> DsmError {
        let (connection, key) = (self.name(), key.to_owned());
        match fault {
            KeyFault::Wrapped => DsmError::Wrapped { connection, key },
            KeyFault::NotGiven => {
                DsmError::NotExportable { connection, key, reason: "the server gives its bytes to nobody".into() }
            }
            KeyFault::WrongKind(reason) => DsmError::WrongKind { connection, key, kind: kind.as_str(), reason },
            KeyFault::WrongUsage(mask, needed) => DsmError::WrongUsage { connection, key, mask, needed },
            KeyFault::Malformed(reason) => DsmError::Damaged { connection, key, reason },
            KeyFault::Material(fault) => DsmError::Material { connection, key, fault },
        }
    }
}

impl Found {
    fn read(&self, kind: KeyKind) -> Result<PlainKey, KeyFault> {
        const UNREADABLE: KeyFault = KeyFault::Malformed("the server's answer holds no object");
        let asks = self.batch.asks(self.name.as_deref().unwrap_or_default(), &self.id);
        let answer = self.response.answers(&asks).ok().and_then(|mut answers| answers.pop()?);
        let object = answer.and_then(Result::ok).and_then(Object::read).ok_or(UNREADABLE)?;
        if object.unique_identifier != self.id {
            return Err(KeyFault::Malformed("the server gave another object than was asked for"));
        }
        key_block::open(kind, &object, &self.attributes)
    }
}
