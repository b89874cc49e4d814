//! Who sent a message, by AWS's word.

use crate::ingress::Sender;

/// The role part of a `SenderId`, where it has the form of an assumed role's: `AROA...:session`.
///
/// `SenderId` "returns the user or role ID" (SQS API Reference, `ReceiveMessage`); roles' begin with `AROA` (IAM User
/// Guide, "IAM identifiers"). A user's (`AIDA...`), an account's, and a federated user's (`account:name`) name no role.
pub fn parse(sender_id: &str) -> Option<Sender> {
    let (role, session) = sender_id.split_once(':')?;
    let rest = role.strip_prefix("AROA")?;
    let is_role = !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit());
    (is_role && !session.is_empty()).then(|| Sender::AwsRole(role.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_assumed_role_is_a_role() {
        for text in ["AROAEXAMPLEID12345678:worker-1", "AROA1:i-0123456789abcdef0", "AROAX:a:b"] {
            let role = text.split(':').next().unwrap();
            assert_eq!(parse(text), Some(Sender::AwsRole(role.to_owned())), "{text}");
        }
        for text in [
            "",
            "AIDAEXAMPLEID12345678",
            "AIDAEXAMPLEID12345678:worker-1",
            "111122223333",
            "111122223333:federated-user",
            "AROAEXAMPLEID12345678",
            "AROAEXAMPLEID12345678:",
            "AROA:session",
            "AROAexample:session",
            "AROA EXAMPLE:session",
            " AROAEXAMPLE:session",
            "arn:aws:sts::111122223333:assumed-role/AROAEXAMPLE/session",
            "xAROAEXAMPLE:session",
            ":AROAEXAMPLE",
            "AROAÄ:session",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
