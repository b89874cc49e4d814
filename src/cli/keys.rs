//! `keyferry keys`: the source keys of the local store.

use super::output::Output;
use super::{Coded, Failed, operator, warn_of_kek_file};
use crate::app::{open_keyring, open_store};
use crate::config::Loaded;
use crate::job::KeyKind;
use crate::source::{KeyMaterial, MaterialFault, PlainKey, SealedKey, open_pem};
use crate::store::{KeyDeletion, NewSourceKey, SourceKeyOrigin, Store};
use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, Subcommand, ValueEnum};
use std::io::Read as _;
use std::path::PathBuf;
use uuid::Uuid;
use zeroize::Zeroizing;

/// Begins the names of keys that are generated for jobs. An operator's key of such a name would fail the job.
const JOBS_PREFIX: &str = "keyferry-";

/// Far more than any encoding of the longest material.
const LARGEST_FILE: u64 = 64 * 1024;

#[derive(Debug, Subcommand)]
pub(super) enum Keys {
    /// Generate a source key.
    Create(Named),
    /// Bring a source key that you hold: the bytes of a secret, or the private key of a pair as PKCS#8, of which the
    /// public key is computed. It is refused for what is wrong with it.
    Import(Import),
    /// List source keys, newest first.
    List {
        /// Erased ones too.
        #[arg(long)]
        deleted: bool,
        /// Rows at most.
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(i64).range(1..=10_000))]
        limit: i64,
        /// Only keys older than this one: the last id of the page before.
        #[arg(long, value_name = "ID")]
        before: Option<Uuid>,
    },
    /// Show one source key and the KMS keys that use it. Never its bytes.
    Show {
        /// Name or id.
        key: String,
    },
    /// Erase a source key's bytes for good. Refused while a KMS key is tied to it: AWS could never be given
    /// the same material again. The name stays taken.
    Delete {
        /// Name or id.
        key: String,
    },
}

#[derive(Debug, Args)]
pub(super) struct Named {
    /// The name by which requests ask for it (`source_key_identifier`).
    #[arg(long, value_parser = name)]
    name: String,
    /// What it is for, named as AWS's `KeySpec`; SM4 is what `SYMMETRIC_DEFAULT` takes in the China Regions.
    #[arg(long, value_parser = kind(), default_value = "SYMMETRIC_DEFAULT")]
    kind: KeyKind,
}

#[derive(Debug, Args)]
pub(super) struct Import {
    #[command(flatten)]
    named: Named,
    /// The file that holds the bytes; - for standard input. They are never taken from the command line.
    #[arg(long, value_name = "FILE")]
    file: PathBuf,
    /// How the bytes are written in the file.
    #[arg(long, default_value = "raw")]
    encoding: Encoding,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Encoding {
    /// The bytes themselves.
    Raw,
    /// Hex digits; white space at the end is ignored.
    Hex,
    /// Base64; white space at the end is ignored.
    Base64,
    /// PEM of a private key of a pair (PRIVATE KEY, not encrypted).
    Pem,
}

impl Keys {
    pub(super) async fn run(self, loaded: &Loaded, output: Output) -> Result<(), Failed> {
        let store = open_store(loaded).await?;
        match self {
            Self::Create(named) => {
                warn_of_kek_file(loaded);
                let keyring = open_keyring(loaded, &store).await?;
                // A large RSA key takes seconds.
                let plain = tokio::task::spawn_blocking(move || PlainKey::generate(named.kind)).await??;
                let key = SealedKey::seal(&keyring, Uuid::now_v7(), named.name, &plain)?;
                add(&store, key, SourceKeyOrigin::Generated, output).await?;
            }
            Self::Import(Import { named, file, encoding }) => {
                let material = read_material(&file, encoding)?;
                let plain = PlainKey::parse(named.kind, material).with_context(|| {
                    format!("{} needs {}, and the file was read as {encoding}", named.kind, named.kind.shape())
                })?;
                warn_of_kek_file(loaded);
                let keyring = open_keyring(loaded, &store).await?;
                let key = SealedKey::seal(&keyring, Uuid::now_v7(), named.name, &plain)?;
                add(&store, key, SourceKeyOrigin::Imported, output).await?;
            }
            Self::List { deleted, limit, before } => {
                let keys = store.source_keys(deleted, before, limit).await?;
                output.table(&keys, ["ID", "NAME", "KIND", "ORIGIN", "USED BY", "CREATED"], |key| {
                    [
                        key.id.to_string(),
                        key.name.clone(),
                        key.kind.clone(),
                        key.deleted_at.map_or(key.origin.clone(), |_| "deleted".into()),
                        key.used_by.len().to_string(),
                        crate::job::rfc3339(key.created_at),
                    ]
                });
            }
            Self::Show { key } => {
                let found = store.source_key(&key).await?.ok_or_else(|| unknown(&key))?;
                output.value(&found, |found| serde_json::to_string_pretty(found).unwrap_or_default());
            }
            Self::Delete { key } => match store.delete_source_key(&key, &operator()).await? {
                KeyDeletion::Deleted => {
                    output.value(&serde_json::json!({"deleted": key}), |_| format!("the bytes of {key} are erased"));
                }
                KeyDeletion::Unknown => return Err(unknown(&key).into()),
                KeyDeletion::InUse(users) => {
                    let message = format!(
                        "{key} is not deleted: it is tied to {}; AWS could never be given that material again",
                        users.join(", ")
                    );
                    return Err(Coded { code: "source_key_in_use", message }.into());
                }
            },
        }
        Ok(())
    }
}

async fn add(store: &Store, key: SealedKey, origin: SourceKeyOrigin, output: Output) -> Result<(), Failed> {
    let (id, name, kind) = (key.id, key.name.clone(), key.kind);
    if !store.add_source_key(&NewSourceKey { key, origin, operator: operator() }).await? {
        let message = format!("a source key is, or was, named {name}; a name never means other bytes: choose another");
        return Err(Coded { code: "source_key_name_taken", message }.into());
    }
    output.value(&serde_json::json!({"id": id, "name": name, "kind": kind.as_str()}), |_| {
        format!("{id}  {name}  {kind}")
    });
    Ok(())
}

fn read_material(file: &PathBuf, encoding: Encoding) -> anyhow::Result<KeyMaterial> {
    // As large as it may become at once: a buffer that grows leaves copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(LARGEST_FILE + 1)?));
    let reader: Box<dyn std::io::Read> = if file.as_os_str() == "-" {
        Box::new(std::io::stdin().lock())
    } else {
        Box::new(std::fs::File::open(file).with_context(|| format!("the file {} cannot be read", file.display()))?)
    };
    reader.take(LARGEST_FILE + 1).read_to_end(&mut bytes).context("the bytes cannot be read")?;
    if bytes.len() as u64 > LARGEST_FILE {
        return Err(MaterialFault::TooLarge.into());
    }
    let text = bytes.trim_ascii_end();
    // As long as any spelling of them: what was decoded before a fault is zeroised with the rest.
    let mut decoded = Zeroizing::new(vec![0; bytes.len()]);
    let length = match encoding {
        Encoding::Raw => {
            decoded.copy_from_slice(&bytes);
            Some(bytes.len())
        }
        Encoding::Hex => hex::decode_to_slice(text, &mut decoded[..text.len() / 2]).ok().map(|()| text.len() / 2),
        Encoding::Base64 => STANDARD.decode_slice(text, &mut decoded).ok(),
        Encoding::Pem => return Ok(open_pem(&bytes)?),
    };
    let length = length.ok_or_else(|| Coded {
        code: "material_wrong_encoding",
        message: format!("the file is not {encoding}; --encoding says how its bytes are written"),
    })?;
    decoded.truncate(length);
    Ok(KeyMaterial::new(std::mem::take(&mut *decoded)))
}

fn name(text: &str) -> Result<String, String> {
    let is_token = (1..=128).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b':' | b'-'));
    if !is_token {
        return Err("expected 1 to 128 of A-Z a-z 0-9 . _ : -".into());
    }
    if Uuid::try_parse(text).is_ok() {
        return Err("a name must not look like an id".into());
    }
    if text.starts_with(JOBS_PREFIX) {
        return Err(format!("names that begin with {JOBS_PREFIX} are for keys that jobs generate"));
    }
    Ok(text.to_owned())
}

/// Every kind, with what it needs.
pub(super) fn kind() -> impl TypedValueParser<Value = KeyKind> {
    let names = KeyKind::ALL.map(|kind| PossibleValue::new(kind.as_str()).help(kind.shape().to_string()));
    PossibleValuesParser::new(names).try_map(|name| KeyKind::parse(&name).ok_or("unknown kind"))
}

fn unknown(key: &str) -> Coded {
    Coded {
        code: "source_key_unknown",
        message: format!("no source key has the name or id {key}; see keyferry keys list"),
    }
}

impl std::fmt::Display for Encoding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw bytes",
            Self::Hex => "hex",
            Self::Base64 => "base64",
            Self::Pem => "PEM",
        })
    }
}
