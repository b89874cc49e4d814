use super::*;
use crate::job::{Envelope, Request};
use proptest::prelude::*;
use std::time::Duration;
use time::macros::datetime;
use tokio::time::Instant;

const NOW: OffsetDateTime = datetime!(2026-11-24 12:00 UTC);
const ID: Uuid = Uuid::from_u128(7);
const POLICY: &str = r#"
    [principals.payroll]
    rabbitmq_users = ["payroll"]
    [principals.operator]
    rabbitmq_users = ["operator"]
    redrive = true
    [[rules]]
    name = "r"
    principals = ["payroll"]
    operations = ["import"]
"#;

fn delivery(user: Option<&str>, redrive: Option<Uuid>) -> Delivery {
    Delivery {
        body: br#"{"id":"r1","key":"arn:aws:kms:eu-central-1:111122223333:key/031c5703-aaf7-425e-a141-7e0c6f5886ab"}"#
            .to_vec(),
        content_type: None,
        message_id: None,
        traceparent: None,
        sender: user.map(|user| Word::RabbitMqUser(user.to_owned())),
        signature: None,
        redrive: redrive.map(|id| id.to_string()),
        received: Instant::now(),
    }
}

fn read(delivery: &Delivery) -> Read {
    Request::parse(Envelope { body: &delivery.body, content_type: None, message_id: None })
}

fn record(delivery: &Delivery, identity: Option<&str>, is_verified: bool, code: RefusalCode) -> RefusalRecord {
    let (id_hash, digest) = known_by(&read(delivery), || [0; 32]);
    RefusalRecord {
        id_hash: id_hash.to_vec(),
        digest: digest_bytes(&digest).to_vec(),
        code: code.as_str().to_owned(),
        identity: identity.map(str::to_owned),
        identity_verified: is_verified,
    }
}

/// Principal, identity and the code of the refusal, if it is one.
fn asks(
    policy: &Policy,
    proof: &Proof,
    delivery: &Delivery,
    record: Option<RefusalRecord>,
) -> (String, String, String) {
    let refusals = record.map(|record| (ID, record)).into_iter().collect();
    let senders = Senders { policy, proof, refusals: &refusals, now: NOW };
    let told = tell(std::slice::from_ref(delivery), policy, proof).remove(0);
    let (asker, code) = match senders.asker(&told, delivery, &read(delivery), || [0; 32]) {
        Ok(asker) => (asker, String::new()),
        Err(refused) => (refused.0, refused.1.code.as_str().to_owned()),
    };
    (asker.principal, asker.sender.identity.unwrap_or_default(), code)
}

fn three(principal: &str, identity: &str, code: &str) -> (String, String, String) {
    (principal.to_owned(), identity.to_owned(), code.to_owned())
}

#[test]
fn the_brokers_word_is_mapped_and_nothing_else_is() {
    let policy = Policy::parse(POLICY).unwrap();
    let by = |delivery: &Delivery| asks(&policy, &Proof::Broker, delivery, None);
    assert_eq!(by(&delivery(Some("payroll"), None)), three("payroll", "rabbitmq:payroll", ""));
    assert_eq!(by(&delivery(Some("other"), None)), three(UNIDENTIFIED, "rabbitmq:other", "identity_unknown"));
    assert_eq!(by(&delivery(None, None)), three(UNIDENTIFIED, "", "identity_missing"));
    let passed_on = Delivery { sender: Some(Word::PassedOn("payroll".into())), ..delivery(None, None) };
    assert_eq!(by(&passed_on), three(UNIDENTIFIED, "rabbitmq:payroll", "identity_missing"));
    let odd = Delivery { sender: Some(Word::RabbitMqUser("pay\nroll".into())), ..delivery(None, None) };
    assert_eq!(by(&odd), three(UNIDENTIFIED, "rabbitmq:pay\u{fffd}roll", "identity_unknown"));
    let role = Delivery { sender: Some(Word::AwsRole("AROAEXAMPLEEXAMPLE12".into())), ..delivery(None, None) };
    assert_eq!(by(&role), three(UNIDENTIFIED, "aws:AROAEXAMPLEEXAMPLE12", "identity_unknown"));
}

#[test]
fn a_redriven_message_asks_in_its_first_senders_name_or_is_refused() {
    let policy = Policy::parse(POLICY).unwrap();
    let first = delivery(None, None);
    let of = |identity, is_verified, code| record(&first, identity, is_verified, code);
    let payroll = || of(Some("rabbitmq:payroll"), true, RefusalCode::NotAllowed);
    let by = |user: &str, record| asks(&policy, &Proof::Broker, &delivery(Some(user), Some(ID)), record);
    assert_eq!(by("operator", Some(payroll())), three("payroll", "rabbitmq:payroll", ""));
    // Who may not, is told so in their own name.
    assert_eq!(by("payroll", Some(payroll())), three("payroll", "rabbitmq:payroll", "redrive_not_allowed"));
    assert_eq!(by("stranger", Some(payroll())), three(UNIDENTIFIED, "rabbitmq:stranger", "identity_unknown"));
    let mismatch = three("operator", "rabbitmq:operator", "redrive_mismatch");
    assert_eq!(by("operator", None), mismatch);
    assert_eq!(by("operator", Some(RefusalRecord { digest: vec![1; 32], ..payroll() })), mismatch);
    assert_eq!(by("operator", Some(RefusalRecord { id_hash: vec![1; 32], ..payroll() })), mismatch);
    let garbled = Delivery { redrive: Some("x".into()), ..delivery(Some("operator"), None) };
    assert_eq!(asks(&policy, &Proof::Broker, &garbled, Some(payroll())), mismatch);
    let not_allowed = three("operator", "rabbitmq:operator", "redrive_not_allowed");
    assert_eq!(by("operator", Some(of(Some("rabbitmq:payroll"), false, RefusalCode::NotAllowed))), not_allowed);
    assert_eq!(by("operator", Some(of(None, false, RefusalCode::NotAllowed))), not_allowed);
    assert_eq!(by("operator", Some(of(Some("key:a"), true, RefusalCode::SignatureExpired))), not_allowed);
    // Mapped anew: who is no longer in the policy is refused in their own name.
    let gone = of(Some("rabbitmq:gone"), true, RefusalCode::IdentityUnknown);
    assert_eq!(by("operator", Some(gone)), three(UNIDENTIFIED, "rabbitmq:gone", "identity_unknown"));
}

#[test]
fn a_refused_redrive_gives_nobody_a_name_to_speak_in() {
    let policy = Policy::parse(POLICY).unwrap();
    let message = delivery(Some("operator"), Some(ID));
    let unproved = record(&message, None, false, RefusalCode::IdentityMissing);
    for (user, found) in [("operator", Some(unproved)), ("operator", None), ("payroll", None), ("stranger", None)] {
        let message = delivery(Some(user), Some(ID));
        let refusals = found.map(|record| (ID, record)).into_iter().collect();
        let senders = Senders { policy: &policy, proof: &Proof::Broker, refusals: &refusals, now: NOW };
        let told = tell(std::slice::from_ref(&message), &policy, &Proof::Broker).remove(0);
        let (asker, _) = *senders.asker(&told, &message, &read(&message), || [0; 32]).unwrap_err();
        assert!(!asker.sender.is_verified, "{user}");
    }
    // Not even if its row said so.
    for code in [RefusalCode::RedriveNotAllowed, RefusalCode::RedriveMismatch] {
        let of_operator = record(&message, Some("rabbitmq:operator"), true, code);
        let again = asks(&policy, &Proof::Broker, &message, Some(of_operator));
        assert_eq!(again, three("operator", "rabbitmq:operator", "redrive_not_allowed"));
    }
}

#[test]
fn with_allow_all_anyone_may_redrive_what_was_refused() {
    let message = delivery(None, Some(ID));
    let known = record(&message, Some("rabbitmq:payroll"), true, RefusalCode::NotAllowed);
    let by = |record| asks(&Policy::AllowAll, &Proof::Nothing, &message, record);
    assert_eq!(by(Some(known.clone())), three(ANONYMOUS, "rabbitmq:payroll", ""));
    assert_eq!(by(None), three(ANONYMOUS, "", "redrive_mismatch"));
    let unproved = RefusalRecord { code: "signature_invalid".into(), ..known };
    assert_eq!(by(Some(unproved)), three(ANONYMOUS, "", "redrive_not_allowed"));
}

#[test]
fn a_signatures_times_are_judged_at_receipt() {
    let key = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n-----END PRIVATE KEY-----";
    let public = "-----BEGIN PUBLIC KEY-----\\nMCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\\n-----END PUBLIC KEY-----";
    let key = crate::policy::SigningKey::from_pem(key).unwrap();
    let text = POLICY.replace(
        "[principals.operator]",
        &format!("[[principals.payroll.signing_keys]]\nid = \"k\"\npublic_key = \"{public}\"\n[principals.operator]"),
    );
    let policy = Policy::parse(&text).unwrap();
    let proof = Proof::Signature { audience: "prod/jobs".into() };
    let send = |audience: &str, expires: OffsetDateTime, age: Duration| {
        let mut message = delivery(None, None);
        message.received = Instant::now().checked_sub(age).unwrap();
        let signed = Signed { redrive: None, content_type: None, body: &message.body };
        message.signature = Some(key.sign("k", audience, expires, signed).unwrap().to_string());
        asks(&policy, &proof, &message, None)
    };
    let second = time::Duration::seconds(1);
    let (fresh, waited) = (Duration::ZERO, Duration::from_secs(60));
    assert_eq!(send("prod/jobs", NOW + second, fresh), three("payroll", "key:k", ""));
    assert_eq!(send("prod/jobs", NOW - second, fresh), three("payroll", "key:k", "signature_expired"));
    assert_eq!(send("prod/jobs", NOW - second, waited), three("payroll", "key:k", ""), "it came in time");
    assert_eq!(send("prod/jobs", NOW + LONGEST_LIFE - second, fresh), three("payroll", "key:k", ""));
    assert_eq!(
        send("prod/jobs", NOW + LONGEST_LIFE + second * 2, fresh),
        three("payroll", "key:k", "signature_expired")
    );
    assert_eq!(send("test/jobs", NOW + second, fresh), three("payroll", "key:k", "signature_audience"));
}

proptest! {
    #[test]
    fn whatever_stands_in_the_headers_nobody_is_known_without_proof(signature in "\\PC{0,60}", user in "[a-z]{1,9}") {
        let policy = Policy::parse(POLICY).unwrap();
        let message = Delivery { signature: Some(signature), ..delivery(Some(&user), None) };
        let proof = Proof::Signature { audience: "prod/jobs".into() };
        let (principal, _, code) = asks(&policy, &proof, &message, None);
        prop_assert_eq!(principal, UNIDENTIFIED);
        prop_assert!(!code.is_empty());
    }
}
