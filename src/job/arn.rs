//! The ARN of a KMS key.

use std::fmt;

/// A KMS key ARN, `arn:<partition>:kms:<region>:<account>:key/<key id>`.
///
/// Aliases are not accepted: `GetParametersForImport` and `ImportKeyMaterial` refuse them
/// (AWS KMS API Reference).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyArn {
    partition: String,
    region: String,
    account: String,
    key_id: String,
}

impl KeyArn {
    /// Parses an ARN. The error says what was expected and never repeats the input.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        const EXPECTED: &str = "expected arn:<partition>:kms:<region>:<12-digit account>:key/<key id>";
        let mut parts = text.splitn(6, ':');
        let mut next = || parts.next().ok_or(EXPECTED);
        let (arn, partition, service) = (next()?, next()?, next()?);
        let (region, account, resource) = (next()?, next()?, next()?);
        if arn != "arn" || service != "kms" {
            return Err(EXPECTED);
        }
        if resource.starts_with("alias/") {
            return Err("an alias was given; AWS imports material by key ARN only");
        }
        let key_id = resource.strip_prefix("key/").ok_or(EXPECTED)?;
        let partition_ok = partition.starts_with("aws") && is_name(partition, 20);
        let account_ok = account.len() == 12 && account.bytes().all(|b| b.is_ascii_digit());
        if !partition_ok || !is_name(region, 32) || !account_ok || !is_key_id(key_id) {
            return Err(EXPECTED);
        }
        Ok(Self {
            partition: partition.to_owned(),
            region: region.to_owned(),
            account: account.to_owned(),
            key_id: key_id.to_owned(),
        })
    }

    /// The AWS partition, such as `aws` or `aws-cn`.
    pub fn partition(&self) -> &str {
        &self.partition
    }

    /// The Region.
    pub fn region(&self) -> &str {
        &self.region
    }

    /// The 12-digit account.
    pub fn account(&self) -> &str {
        &self.account
    }

    /// The key id: a UUID, or `mrk-` and 32 hex digits for a multi-Region key.
    pub fn key_id(&self) -> &str {
        &self.key_id
    }

    /// The name of the line: all Regions of a multi-Region key share it.
    pub fn order_key(&self) -> String {
        format!("{}:{}:{}", self.partition, self.account, self.key_id)
    }
}

impl fmt::Display for KeyArn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { partition, region, account, key_id } = self;
        write!(f, "arn:{partition}:kms:{region}:{account}:key/{key_id}")
    }
}

impl fmt::Debug for KeyArn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn is_name(text: &str, longest: usize) -> bool {
    !text.is_empty()
        && text.len() <= longest
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

fn is_key_id(text: &str) -> bool {
    let is_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if let Some(rest) = text.strip_prefix("mrk-") {
        return rest.len() == 32 && rest.bytes().all(is_hex);
    }
    text.len() == 36
        && text.bytes().enumerate().all(|(at, b)| if matches!(at, 8 | 13 | 18 | 23) { b == b'-' } else { is_hex(b) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARN: &str = "arn:aws:kms:eu-central-1:111122223333:key/031c5703-aaf7-425e-a141-7e0c6f5886ab";

    #[test]
    fn an_arn_prints_as_it_was_read() {
        let arn = KeyArn::parse(ARN).unwrap();
        assert_eq!(arn.to_string(), ARN);
        assert_eq!(arn.order_key(), "aws:111122223333:031c5703-aaf7-425e-a141-7e0c6f5886ab");
    }

    #[test]
    fn all_regions_of_a_multi_region_key_are_one_line() {
        let of = |region: &str| {
            KeyArn::parse(&format!("arn:aws:kms:{region}:111122223333:key/mrk-{}", "0a".repeat(16)))
                .unwrap()
                .order_key()
        };
        assert_eq!(of("eu-central-1"), of("us-east-1"));
    }

    #[test]
    fn what_is_not_a_key_arn_is_refused() {
        for text in [
            "",
            "arn",
            "arn:aws:kms:eu-central-1:111122223333:alias/payroll",
            "arn:aws:s3:eu-central-1:111122223333:key/031c5703-aaf7-425e-a141-7e0c6f5886ab",
            "arn:aws:kms:eu-central-1:11112222333:key/031c5703-aaf7-425e-a141-7e0c6f5886ab",
            "arn:aws:kms:eu-central-1:111122223333:key/031C5703-aaf7-425e-a141-7e0c6f5886ab",
            "arn:aws:kms:EU:111122223333:key/031c5703-aaf7-425e-a141-7e0c6f5886ab",
            "arn:evil:kms:eu-central-1:111122223333:key/031c5703-aaf7-425e-a141-7e0c6f5886ab",
            "arn:aws:kms:eu-central-1:111122223333:key/mrk-zz",
            "arn:aws:kms:eu-central-1:111122223333:key/031c5703-aaf7-425e-a141-7e0c6f5886ab ",
        ] {
            assert!(KeyArn::parse(text).is_err(), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn parsing_never_panics_and_what_parses_prints_the_same(text in "arn:aws[a-z:0-9/-]{0,80}|\\PC{0,80}") {
            if let Ok(arn) = KeyArn::parse(&text) {
                proptest::prop_assert_eq!(arn.to_string(), text);
            }
        }
    }
}
