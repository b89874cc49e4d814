//! Operations on key pairs, which prove what pair is in force.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde_json::json;

use crate::crypto::Unopened;
use crate::keys::usable;
use crate::kinds::{KeyUsage, MessageType, Origin, SigningAlgorithm};
use crate::metadata::algorithms;
use crate::operations::{Done, Errand, Halt, Work, internal, known_key, named_key};
use crate::pairs::Pair;
use crate::refusal::{self, Refusal};
use crate::request::{Blob, blob, choice, parse, required};
use crate::world::State;

/// `GetPublicKey`. That it fails for a disabled key is UNVERIFIED.
pub fn get_public_key(state: &mut State, work: &Work<'_>) -> Result<Done, Halt> {
    let lag = state.options.change_lag_ms;
    let key = named_key(state, work)?;
    if !key.spec.is_pair() {
        return Err(refusal::wrong_spec(&key.arn, key.spec.name()).into());
    }
    if key.origin == Origin::AwsKms {
        return Err(refusal::unsupported("This test double makes no key pairs of its own.").into());
    }
    let now = key.shown();
    let shown = key.outdated(work.now, lag).unwrap_or(&now);
    usable(&key.arn, shown.view.state)?;
    let public_key = shown.public_key.as_ref().ok_or_else(|| refusal::pending_import(&key.arn))?;
    let mut body = json!({
        "KeyId": &*key.arn,
        "PublicKey": BASE64.encode(public_key),
        "CustomerMasterKeySpec": key.spec.name(),
        "KeySpec": key.spec.name(),
        "KeyUsage": key.usage.name(),
    });
    let (name, algorithms) = algorithms(key.spec, key.usage);
    body[name] = algorithms;
    Ok(body.into())
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SignRequest {
    key_id: Option<String>,
    message: Option<Blob>,
    message_type: Option<String>,
    signing_algorithm: Option<String>,
    signature: Option<Blob>,
}

/// `Sign`.
pub fn sign(state: &mut State, work: &mut Work<'_>) -> Result<Done, Halt> {
    let request: SignRequest = parse(&work.call.body)?;
    let Signing { arn, pair, algorithm, message } = signing(state, work, request)?;
    let signature = match work.signature.take() {
        None => return Err(Halt::First(Errand::Sign(pair, algorithm, message))),
        Some(Err(Unopened)) => return Err(internal("signing failed").into()),
        Some(Ok(signature)) => signature,
    };
    Ok(json!({
        "KeyId": arn,
        "Signature": BASE64.encode(signature),
        "SigningAlgorithm": algorithm.name(),
    })
    .into())
}

/// `Verify`.
pub fn verify(state: &mut State, work: &Work<'_>) -> Result<Done, Halt> {
    let request: SignRequest = parse(&work.call.body)?;
    let signature = blob(request.signature.clone(), "signature", 6_144)?;
    let Signing { arn, pair, algorithm, message } = signing(state, work, request)?;
    if !pair.verify(algorithm, &message, &signature) {
        return Err(Refusal::new("KMSInvalidSignatureException", "").into());
    }
    Ok(json!({ "KeyId": arn, "SignatureValid": true, "SigningAlgorithm": algorithm.name() }).into())
}

struct Signing {
    arn: String,
    pair: Arc<Pair>,
    algorithm: SigningAlgorithm,
    message: Vec<u8>,
}

fn signing(state: &mut State, work: &Work<'_>, request: SignRequest) -> Result<Signing, Halt> {
    let message = blob(request.message, "message", 4_096)?;
    if choice(request.message_type.as_deref(), "messageType")? == Some(MessageType::Digest) {
        return Err(refusal::unsupported("This test double signs messages, not digests.").into());
    }
    let algorithm = required(choice(request.signing_algorithm.as_deref(), "signingAlgorithm")?, "signingAlgorithm")?;
    let arn = work.key_arn(request.key_id.as_deref())?;
    let key = known_key(state, work, &arn)?;
    key.check_usable()?;
    if key.usage != KeyUsage::SignVerify {
        return Err(refusal::wrong_usage(&key.arn, key.usage.name()).into());
    }
    if !key.spec.signing().contains(&algorithm) {
        return Err(refusal::wrong_algorithm(algorithm.name(), key.spec.name()).into());
    }
    let pair = key.current().and_then(|material| material.pair()).map(Arc::clone);
    let pair = pair.ok_or_else(|| refusal::unsupported("This test double makes no key pairs of its own."))?;
    Ok(Signing { arn, pair, algorithm, message })
}
