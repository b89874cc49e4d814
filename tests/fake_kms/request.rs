//! Reading the members of a request, with AWS's errors for what is missing or malformed.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};

use crate::kinds::Choice;
use crate::materials::MaterialId;
use crate::refusal::{self, Refusal};

/// A binary member: base64 on the wire.
#[derive(Clone, Debug)]
pub struct Blob(pub Vec<u8>);

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        BASE64.decode(text.as_bytes()).map(Self).map_err(serde::de::Error::custom)
    }
}

/// The request as a whole. Unknown members are ignored, as AWS does.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(if body.is_empty() { b"{}" } else { body })
        .map_err(|error| refusal::serialization(error.to_string()))
}

/// A member that must be there.
pub fn required<T>(member: Option<T>, name: &str) -> Result<T, Refusal> {
    member.ok_or_else(|| refusal::constraint("null", name, "Member must not be null"))
}

/// A binary member that must be there and within AWS's bounds.
pub fn blob(member: Option<Blob>, name: &str, most: usize) -> Result<Vec<u8>, Refusal> {
    let Blob(bytes) = required(member, name)?;
    if bytes.is_empty() || bytes.len() > most {
        let rule = format!("Member must have length between 1 and {most}");
        return Err(refusal::constraint("[redacted]", name, &rule));
    }
    Ok(bytes)
}

/// A member with one of AWS's names for its value.
pub fn choice<T: Choice>(member: Option<&str>, name: &str) -> Result<Option<T>, Refusal> {
    let Some(text) = member else { return Ok(None) };
    T::choose(text).map(Some).ok_or_else(|| {
        let rule = format!("Member must satisfy enum value set: [{}]", T::NAMES.join(", "));
        refusal::constraint(&format!("'{text}'"), name, &rule)
    })
}

/// AWS's `KeyMaterialId`.
pub fn material_id(member: Option<&str>) -> Result<Option<MaterialId>, Refusal> {
    let Some(text) = member else { return Ok(None) };
    let mut id = [0; 32];
    let lower = text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    if !lower || hex::decode_to_slice(text, &mut id).is_err() {
        let rule = "Member must satisfy regular expression pattern: ^[a-f0-9]+$ and have length 64";
        return Err(refusal::constraint(&format!("'{text}'"), "keyMaterialId", rule));
    }
    Ok(Some(id))
}

/// A number within AWS's bounds.
pub fn number(member: Option<i64>, name: &str, least: i64, most: i64, default: i64) -> Result<i64, Refusal> {
    match member {
        None => Ok(default),
        Some(value) if (least..=most).contains(&value) => Ok(value),
        Some(value) => {
            let rule = format!("Member must be between {least} and {most}");
            Err(refusal::constraint(&format!("'{value}'"), name, &rule))
        }
    }
}

/// The ARN that a `KeyId` stands for, in the caller's account and Region unless it is an ARN itself.
pub fn key_arn(key_id: &str, account: &str, region: &str) -> Result<String, Refusal> {
    if key_id.is_empty() || key_id.len() > 2_048 {
        return Err(refusal::constraint("[key]", "keyId", "Member must have length between 1 and 2048"));
    }
    if key_id.starts_with("arn:") {
        let parts: Vec<_> = key_id.splitn(6, ':').collect();
        return match parts[..] {
            ["arn", _, "kms", _, _, resource] if resource.starts_with("alias/") => Err(unknown_alias(key_id)),
            ["arn", _, "kms", _, _, resource] if resource.starts_with("key/") => Ok(key_id.to_owned()),
            _ => Err(Refusal::new("InvalidArnException", format!("Invalid arn {key_id}"))),
        };
    }
    if key_id.starts_with("alias/") {
        return Err(unknown_alias(&format!("arn:{}:kms:{region}:{account}:{key_id}", partition(region))));
    }
    if key_id.contains([':', '/']) {
        // UNVERIFIED text.
        return Err(Refusal::new("NotFoundException", format!("Invalid keyId '{key_id}'")));
    }
    Ok(new_arn(key_id, account, region))
}

/// The ARN of a key id.
pub fn new_arn(id: &str, account: &str, region: &str) -> String {
    format!("arn:{}:kms:{region}:{account}:key/{id}", partition(region))
}

/// Whether the Region is in China, where KMS has other algorithms.
pub fn is_china(region: &str) -> bool {
    region.starts_with("cn-")
}

fn partition(region: &str) -> &'static str {
    match region {
        china if is_china(china) => "aws-cn",
        government if government.starts_with("us-gov-") => "aws-us-gov",
        _ => "aws",
    }
}

/// There are no aliases here; how AWS refuses them where it takes none is UNVERIFIED.
fn unknown_alias(arn: &str) -> Refusal {
    Refusal::new("NotFoundException", format!("Alias {arn} is not found."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_ids_become_arns() {
        let arn = |key_id| key_arn(key_id, "1", "eu-central-1").map_err(|refusal| refusal.code.into_owned());
        assert_eq!(arn("abc"), Ok("arn:aws:kms:eu-central-1:1:key/abc".to_owned()));
        assert_eq!(arn("arn:aws:kms:us-east-1:2:key/abc"), Ok("arn:aws:kms:us-east-1:2:key/abc".to_owned()));
        assert_eq!(arn("arn:aws:sqs:us-east-1:2:abc"), Err("InvalidArnException".to_owned()));
        for (region, partition) in [("cn-north-1", "aws-cn"), ("us-gov-west-1", "aws-us-gov"), ("us-east-1", "aws")] {
            assert_eq!(new_arn("abc", "1", region), format!("arn:{partition}:kms:{region}:1:key/abc"));
        }
        assert_eq!(arn("alias/a"), Err("NotFoundException".to_owned()));
        assert_eq!(arn(""), Err("ValidationException".to_owned()));
    }

    #[test]
    fn material_ids_are_lower_case_hexadecimal() {
        assert!(material_id(Some(&"0f".repeat(32))).is_ok());
        assert!(material_id(Some(&"0F".repeat(32))).is_err());
        assert!(material_id(Some("0f")).is_err());
    }
}
