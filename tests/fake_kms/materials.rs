//! The materials of a key: what is known of their bytes, and what they are to the key.

use std::sync::Arc;

use crate::crypto::{Opened, Plain, Sealed, sha256};
use crate::kinds::{ExpirationModel, Millis, Role};
use crate::pairs::Pair;

/// The raw form of AWS's `KeyMaterialId`.
pub type MaterialId = [u8; 32];

/// One material of a key.
#[derive(Debug)]
pub struct Material {
    /// Its id; for symmetric keys the client sees it.
    pub id: MaterialId,
    /// What it is to the key.
    pub role: Role,
    /// Whether its bytes are there.
    pub imported: bool,
    /// Whether its bytes ever were: a replica knows of materials that only its primary was given.
    pub given: bool,
    /// The bytes, as far as known.
    pub contents: Contents,
    /// The client's text.
    pub description: Option<String>,
    /// Set while imported.
    pub model: Option<ExpirationModel>,
    /// When it goes, if it expires.
    pub valid_to: Option<Millis>,
    /// When it became the current one, if by a rotation.
    pub rotated_at: Option<Millis>,
}

/// What is known of a material's bytes.
#[derive(Debug)]
pub enum Contents {
    /// Unwrapped. The secret is gone once the material is deleted; the digests stay, to know the material again.
    Known {
        /// What it is known again by.
        digests: Digests,
        /// What it is used by, while imported.
        secret: Option<Secret>,
    },
    /// Not unwrapped yet (`--unwrap lazy`).
    Sealed(Arc<Sealed>),
    /// Did not unwrap when somebody looked (`--unwrap lazy`): the text says why.
    Broken(&'static str),
}

/// Key material ready for use.
#[derive(Debug)]
pub enum Secret {
    /// Of symmetric and HMAC keys.
    Bytes(Plain),
    /// Of pairs.
    Pair(Arc<Pair>),
}

/// The digests of a material.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digests {
    /// SHA-256 over the bytes that were wrapped.
    pub material: [u8; 32],
    /// SHA-256 over the public key of a pair.
    pub public_key: Option<[u8; 32]>,
}

/// What a deletion or an expiry removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deleted {
    /// The material's id.
    pub id: MaterialId,
    /// Its digests, if known.
    pub digests: Option<Digests>,
}

/// What `ListKeyRotations` shows of a material.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its id.
    pub id: MaterialId,
    /// What it is to the key.
    pub role: Role,
    /// Whether its bytes are there.
    pub imported: bool,
    /// The client's text.
    pub description: Option<String>,
    /// Whether it expires.
    pub model: Option<ExpirationModel>,
    /// When it expires.
    pub valid_to: Option<Millis>,
    /// When it came by a rotation.
    pub rotated_at: Option<Millis>,
}

/// What KMS tells the replicas of a multi-Region key about a material of their primary.
#[derive(Clone, Debug)]
pub struct Notice {
    /// Its id, the same in every Region.
    pub id: MaterialId,
    /// What it is to the key.
    pub role: Role,
    /// The client's text.
    pub description: Option<String>,
    /// What it is known again by.
    pub digests: Option<Digests>,
    /// When it came by a rotation.
    pub rotated_at: Option<Millis>,
}

impl Material {
    /// A material that has just come. Its expiry is set later.
    pub fn new(id: MaterialId, role: Role, contents: Contents) -> Self {
        Self {
            id,
            role,
            imported: true,
            given: true,
            contents,
            description: None,
            model: None,
            valid_to: None,
            rotated_at: None,
        }
    }

    /// A material that a replica has heard of. `None` if nobody knows what it is.
    pub fn announced(notice: &Notice) -> Option<Self> {
        let contents = Contents::Known { digests: notice.digests.clone()?, secret: None };
        let mut material = Self { imported: false, given: false, ..Self::new(notice.id, notice.role, contents) };
        material.heed(notice);
        Some(material)
    }

    /// Takes over what the primary says.
    pub fn heed(&mut self, notice: &Notice) {
        self.role = notice.role;
        self.description.clone_from(&notice.description);
        self.rotated_at = notice.rotated_at;
    }

    /// Whether the primary says nothing new.
    pub fn agrees(&self, notice: &Notice) -> bool {
        self.id == notice.id && self.role == notice.role && self.description == notice.description
    }

    /// What the replicas are told.
    pub fn notice(&self) -> Notice {
        Notice {
            id: self.id,
            role: self.role,
            description: self.description.clone(),
            digests: self.contents.digests().cloned(),
            rotated_at: self.rotated_at,
        }
    }

    /// What `ListKeyRotations` shows.
    pub fn listed(&self) -> Listed {
        Listed {
            id: self.id,
            role: self.role,
            imported: self.imported,
            description: self.description.clone(),
            model: self.model,
            valid_to: self.valid_to,
            rotated_at: self.rotated_at,
        }
    }

    /// The bytes of a symmetric or HMAC key, if they are there and known.
    pub fn bytes(&self) -> Option<&Plain> {
        match &self.contents {
            Contents::Known { secret: Some(Secret::Bytes(bytes)), .. } => Some(bytes),
            _ => None,
        }
    }

    /// The key pair, if it is there.
    pub fn pair(&self) -> Option<&Arc<Pair>> {
        match &self.contents {
            Contents::Known { secret: Some(Secret::Pair(pair)), .. } => Some(pair),
            _ => None,
        }
    }

    /// Whether it is tied to the key for ever.
    pub fn is_permanent(&self) -> bool {
        !self.role.is_pending()
    }

    /// The bytes are gone.
    pub fn forget(&mut self) -> Deleted {
        self.imported = false;
        self.model = None;
        self.valid_to = None;
        self.contents.forget();
        Deleted { id: self.id, digests: self.contents.digests().cloned() }
    }
}

impl Contents {
    /// What has been unwrapped.
    pub fn of(opened: Opened) -> Self {
        let material = sha256(&[&opened.bytes]);
        let (public_key, secret) = match opened.pair {
            Some(pair) => (Some(sha256(&[&pair.public])), Secret::Pair(pair)),
            None => (None, Secret::Bytes(opened.bytes)),
        };
        Self::Known { digests: Digests { material, public_key }, secret: Some(secret) }
    }

    /// The digests, if it was unwrapped.
    pub fn digests(&self) -> Option<&Digests> {
        match self {
            Self::Known { digests, .. } => Some(digests),
            Self::Sealed(_) | Self::Broken(_) => None,
        }
    }

    /// The digest by which a material is known again: two documents may hold the same private key.
    pub fn identity(&self) -> Option<&[u8; 32]> {
        self.digests().map(|digests| digests.public_key.as_ref().unwrap_or(&digests.material))
    }

    /// The bytes are gone. What nobody has looked into keeps its wrapped form until somebody does.
    pub fn forget(&mut self) {
        if let Self::Known { secret, .. } = self {
            *secret = None;
        }
    }
}
