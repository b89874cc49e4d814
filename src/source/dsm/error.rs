//! Why a dsm key cannot be had: one variant for each cause, said so that it can be mended.

use crate::retry::Class;
use crate::source::MaterialFault;

/// Why a key was not fetched. Says what to do; never holds key bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DsmError {
    /// No connection is configured.
    #[error("no KMIP server is configured: write a table [dsm.NAME] into the settings")]
    NotConfigured,
    /// The reference names none, and none is the default.
    #[error("several dsm connections are configured ({configured}): name one, as in {first}/KEY, or set dsm_default")]
    NoDefault {
        /// Their names.
        configured: String,
        /// The first of them.
        first: String,
    },
    /// The reference names one that is not configured.
    #[error(
        "no dsm connection is named {name}; configured: {configured}. A name with a slash needs its connection before it"
    )]
    UnknownConnection {
        /// The name.
        name: String,
        /// The names that there are.
        configured: String,
    },
    /// No server could be reached, none answered, or all are left alone for having failed other jobs.
    #[error("the dsm connection {connection} has no server that answers: {reason}")]
    Unavailable {
        /// The connection.
        connection: String,
        /// Each server's fault.
        reason: String,
    },
    /// All connections were taken for too long.
    #[error("all connections of the dsm connection {connection} were busy; see dsm.{connection}.max_connections")]
    Busy {
        /// The connection.
        connection: String,
    },
    /// A server's certificate is not what the settings demand.
    #[error(
        "the dsm connection {connection} has no server whose certificate can be trusted: {reason}; see ca_file and server_name"
    )]
    Untrusted {
        /// The connection.
        connection: String,
        /// Each server's fault.
        reason: String,
    },
    /// The server does not take the client's certificate.
    #[error(
        "the dsm connection {connection} is not let in: {reason}; see cert_file, and the client's registration on the server"
    )]
    Unauthenticated {
        /// The connection.
        connection: String,
        /// What the server said.
        reason: String,
    },
    /// The server does not let this client have the key, or do what was asked.
    #[error("the dsm connection {connection} may not have {key}: {reason}; its owner can allow it on the server")]
    Denied {
        /// The connection.
        connection: String,
        /// The key.
        key: String,
        /// What the server said.
        reason: String,
    },
    /// The server's answer to what this job asked is not what KMIP demands.
    #[error(
        "the dsm connection {connection} cannot be talked to: {reason}; is it a KMIP server, and dsm.{connection}.protocol right?"
    )]
    Protocol {
        /// The connection.
        connection: String,
        /// What was wrong.
        reason: String,
    },
    /// No key has that name or identifier.
    #[error(
        "the dsm connection {connection} has no key {key} that it lets this client see, by name or unique identifier"
    )]
    KeyUnknown {
        /// The connection.
        connection: String,
        /// What was asked for.
        key: String,
    },
    /// Several keys have that name.
    #[error("the dsm connection {connection} has several keys named {key}: give one's unique identifier: {}{}", candidates.join(", "), if *more { ", ..." } else { "" })]
    KeyAmbiguous {
        /// The connection.
        connection: String,
        /// The name.
        key: String,
        /// Unique identifiers, at most 16.
        candidates: Vec<String>,
        /// Whether there are more.
        more: bool,
    },
    /// The key is not active.
    #[error("the key {key} of the dsm connection {connection} is {state}, and only Active keys are used")]
    WrongState {
        /// The connection.
        connection: String,
        /// The key.
        key: String,
        /// KMIP's word.
        state: String,
    },
    /// Another kind of key than the KMS key takes.
    #[error("the key {key} of the dsm connection {connection} is no {kind}: {reason}")]
    WrongKind {
        /// The connection.
        connection: String,
        /// The key.
        key: String,
        /// The kind that was needed.
        kind: &'static str,
        /// What it is instead.
        reason: String,
    },
    /// The usage mask contradicts what AWS would use the key for.
    #[error(
        "the key {key} of the dsm connection {connection} is not meant for this: its usage mask {mask:#x} allows neither Export nor {needed}"
    )]
    WrongUsage {
        /// The connection.
        connection: String,
        /// The key.
        key: String,
        /// The mask.
        mask: u32,
        /// What would have been enough.
        needed: &'static str,
    },
    /// The server keeps the key's bytes to itself.
    #[error("the key {key} of the dsm connection {connection} cannot be exported: {reason}; a key that can is needed")]
    NotExportable {
        /// The connection.
        connection: String,
        /// The key.
        key: String,
        /// What the server said.
        reason: String,
    },
    /// The server gave the key out under another key.
    #[error(
        "the key {key} of the dsm connection {connection} comes wrapped under another key, which Keyferry does not have; let the server give it out unwrapped"
    )]
    Wrapped {
        /// The connection.
        connection: String,
        /// The key.
        key: String,
    },
    /// What the server holds cannot be read.
    #[error("the key {key} of the dsm connection {connection} cannot be read: {reason}")]
    Damaged {
        /// The connection.
        connection: String,
        /// The key.
        key: String,
        /// Why.
        reason: &'static str,
    },
    /// What the server holds is no sound key.
    #[error("the key {key} of the dsm connection {connection} cannot be used: {fault}")]
    Material {
        /// The connection.
        connection: String,
        /// The key.
        key: String,
        /// Why.
        fault: MaterialFault,
    },
}

impl DsmError {
    /// A stable word for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotConfigured => "dsm_not_configured",
            Self::NoDefault { .. } | Self::UnknownConnection { .. } => "dsm_connection_unknown",
            Self::Unavailable { .. } | Self::Busy { .. } => "dsm_unavailable",
            Self::Untrusted { .. } => "dsm_untrusted",
            Self::Unauthenticated { .. } => "dsm_unauthenticated",
            Self::Denied { .. } => "dsm_denied",
            Self::Protocol { .. } => "dsm_protocol",
            Self::KeyUnknown { .. } => "source_key_unknown",
            Self::KeyAmbiguous { .. } => "source_key_ambiguous",
            Self::WrongState { .. } => "source_key_wrong_state",
            Self::WrongKind { .. } => "source_key_wrong_kind",
            Self::WrongUsage { .. } => "source_key_wrong_usage",
            Self::NotExportable { .. } => "source_key_not_exportable",
            Self::Wrapped { .. } => "source_key_wrapped",
            Self::Damaged { .. } => "source_key_damaged",
            Self::Material { fault, .. } => fault.code(),
        }
    }

    /// How it is tried again; `None`: time alone changes nothing.
    ///
    /// A certificate that is not taken is renewed by whoever keeps it, for all jobs at once: they wait, as they do where AWS
    /// does not take the credentials.
    pub fn retry(&self) -> Option<Class> {
        match self {
            Self::Unavailable { .. } | Self::Busy { .. } => Some(Class::Transient),
            Self::Untrusted { .. } | Self::Unauthenticated { .. } => Some(Class::Credentials),
            _ => None,
        }
    }
}
