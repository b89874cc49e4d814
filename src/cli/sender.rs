//! How a command that publishes says who it is, and under which principal its requests are found again.

use super::output::duration;
use crate::app::open_broker;
use crate::config::{IdentityProof, Loaded, Transport};
use crate::policy::{ANONYMOUS, Identity, Policy, Signed, Signer, SigningKey, UNIDENTIFIED};
use anyhow::{Context as _, anyhow, bail};
use clap::Args;
use std::path::{Path, PathBuf};
use std::time::Duration;
use time::OffsetDateTime;
use zeroize::Zeroizing;

#[derive(Debug, Default, Args)]
pub(super) struct SignArgs {
    /// Sign each message with this Ed25519 key: PKCS#8 PEM, as `openssl genpkey -algorithm ed25519` writes it.
    #[arg(long, value_name = "FILE", requires = "sign_key_id")]
    sign_key_file: Option<PathBuf>,
    /// The id under which the policy knows the key.
    #[arg(long, value_name = "ID", requires = "sign_key_file")]
    sign_key_id: Option<String>,
    /// How long a message may be on its way, outages of the worker included; 14 days at most.
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = duration)]
    sign_for: Duration,
    /// AMQP `user-id`; absent: the user of `rabbitmq.url`. Needed where a client certificate is the login.
    #[arg(long, value_name = "NAME")]
    user_id: Option<String>,
}

/// What proves the sender of this command's messages.
pub(super) struct Sender {
    /// AMQP `user-id`, which the broker compares with the user of the connection.
    pub(super) user_id: Option<String>,
    pub(super) signer: Option<Signer>,
}

impl SignArgs {
    /// Reads the key, if there is one.
    pub(super) fn sender(self, loaded: &Loaded, transport: Transport) -> anyhow::Result<Sender> {
        let (senders, section) = (loaded.senders(transport), transport.as_str());
        let signer = match self.sign_key_file.zip(self.sign_key_id) {
            Some((file, id)) => {
                let audience = senders.audience.clone().ok_or_else(|| {
                    anyhow!("a signature names its audience: write the worker's {section}.audience into the settings")
                })?;
                if let Some(warning) = Loaded::signing_key_warning(&file) {
                    eprintln!("keyferry: warning: {warning}");
                }
                Some(Signer { key: read_key(&file)?, id, audience, life: self.sign_for })
            }
            None if senders.identity_proof == Some(IdentityProof::Signature) => {
                bail!("{section}.identity_proof = \"signature\": give --sign-key-file and --sign-key-id")
            }
            None => None,
        };
        let user_id = match (self.user_id, transport) {
            (Some(user), _) => Some(user),
            (None, Transport::RabbitMq) => open_broker(loaded)?.user().map(str::to_owned),
            (None, Transport::Sqs) => None,
        };
        Ok(Sender { user_id, signer })
    }
}

impl Sender {
    /// The header `keyferry-signature` of a message, if messages are signed.
    pub(super) fn sign(&self, signed: Signed<'_>) -> anyhow::Result<Option<String>> {
        let Some(signer) = &self.signer else { return Ok(None) };
        let header = signer.header(now(), signed).ok_or_else(|| {
            anyhow!("it cannot be signed: --sign-key-id or the audience has characters that a signature cannot hold")
        })?;
        Ok(Some(header))
    }

    /// Under which principal the worker knows this sender: `given`, or what the policy of the settings says.
    pub(super) fn principal(&self, loaded: &Loaded, given: Option<String>) -> anyhow::Result<String> {
        let identity = match &self.signer {
            Some(signer) => Some(Identity::SigningKey(signer.id.clone())),
            None => self.user_id.clone().map(Identity::RabbitMqUser),
        };
        principal(loaded, identity.as_ref(), given)
    }
}

/// Under which principal requests are looked for: `given`, or the one that the policy of the settings has for an identity.
pub(super) fn principal(loaded: &Loaded, identity: Option<&Identity>, given: Option<String>) -> anyhow::Result<String> {
    if let Some(given) = given {
        return Ok(given);
    }
    if loaded.settings.policy.is_none() {
        return Ok(ANONYMOUS.into());
    }
    let policy = loaded.policy().context("the principal is not known; name it with --principal")?;
    Ok(match &policy {
        Policy::AllowAll => ANONYMOUS,
        // Whose messages the worker refuses.
        Policy::Rules(_) => identity.and_then(|identity| policy.principal(identity)).unwrap_or(UNIDENTIFIED),
    }
    .to_owned())
}

fn read_key(file: &Path) -> anyhow::Result<SigningKey> {
    let text = std::fs::read(file)
        .map(Zeroizing::new)
        .with_context(|| format!("the file {} of --sign-key-file cannot be read", file.display()))?;
    let text = std::str::from_utf8(&text).unwrap_or_default();
    SigningKey::from_pem(text).with_context(|| format!("the file {} of --sign-key-file cannot be used", file.display()))
}

/// The time of this machine. A publisher has no other: it need not reach the store.
#[expect(clippy::disallowed_methods, reason = "whoever signs, or tries a policy, has no store to ask")]
pub(super) fn now() -> OffsetDateTime {
    OffsetDateTime::now_utc()
}
