use super::*;
use proptest::prelude::*;
use time::macros::datetime;

const NOW: OffsetDateTime = datetime!(2026-11-24 12:00 UTC);
const ARN: &str = "arn:aws:kms:eu-central-1:111122223333:key/031c5703-aaf7-425e-a141-7e0c6f5886ab";
const MATERIAL: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

fn parse(body: &str) -> Result<Request, Box<Rejected>> {
    let request = Request::parse(Envelope { body: body.as_bytes(), content_type: None, message_id: None })?;
    match request.judge_times(NOW) {
        Ok(()) => Ok(request),
        Err(refusal) => Err(Box::new(Rejected { id: None, source: String::new(), key: None, refusal })),
    }
}

fn with(extra: &str) -> String {
    format!(r#"{{"id":"a","key":"{ARN}"{extra}}}"#)
}

fn code(body: &str) -> &'static str {
    match parse(body) {
        Ok(_) => "accepted",
        Err(rejected) => rejected.refusal.code.as_str(),
    }
}

#[test]
fn the_original_calls_fields_are_read() {
    let request = parse(&with(
        r#","source_key_tier":"local","source_key_identifier":"test-key","key_expiration":true,"valid_to":"2026-12-04T06:51:18.505860192Z""#,
    ))
    .unwrap();
    let Work::Import(import) = &request.work else { panic!("{request:?}") };
    assert_eq!(import.material.source_key, SourceKeyRef::Local(Some("test-key".into())));
    assert_eq!(import.material.expiry, Expiry::At(datetime!(2026-12-04 06:51:18 UTC)));
    assert_eq!(request.deadline_from(NOW), datetime!(2026-11-27 12:00 UTC));
}

#[test]
fn every_rule_has_its_code() {
    let too_far = r#","key_expiration":true,"valid_to":"2027-11-24T11:00:01Z""#;
    for (body, expected) in [
        ("", "not_json"),
        ("{", "not_json"),
        ("{} {}", "not_json"),
        ("[1]", "not_an_object"),
        ("7", "not_an_object"),
        ("{\"a\":\"\u{0}\"}", "nul_character"),
        (r#"{"id":"a\u0000"}"#, "nul_character"),
        (r#"{"id":"a","id":"a"}"#, "duplicate_field"),
        (&with(r#","key":"x""#), "duplicate_field"),
        (&with(r#","colour":"red""#), "unknown_field"),
        (&format!(r#"{{"key":"{ARN}"}}"#), "missing_field"),
        (r#"{"id":"a"}"#, "missing_field"),
        (r#"{"id":"a b","key":"x"}"#, "invalid_value"),
        (r#"{"id":7,"key":"x"}"#, "wrong_type"),
        (&with(r#","key_expiration":"true""#), "wrong_type"),
        (&with(r#","valid_to":null"#), "wrong_type"),
        (r#"{"id":"a","key":"arn:aws:kms:x"}"#, "invalid_arn"),
        (&with(r#","operation":"rotate","source_key_identifier":"next""#), "accepted"),
        (&with(r#","operation":"rotate","scope":"all""#), "field_not_allowed"),
        (&with(&format!(r#","operation":"rotate","key_material_id":"{MATERIAL}""#)), "field_not_allowed"),
        (&with(r#","operation":"rotate","urgent":true"#), "field_not_allowed"),
        (&with(r#","operation":"rotate","key_expiration":true"#), "valid_to_missing"),
        (&with(&format!(r#","operation":"rotate"{too_far}"#)), "valid_to_too_far"),
        (&with(r#","operation":"explode""#), "unknown_operation"),
        (&with(r#","source_key_tier":"dsm""#), "missing_field"),
        (&with(r#","source_key_tier":"dsm","source_key_identifier":"/k""#), "invalid_value"),
        (&with(r#","source_key_tier":"dsm","source_key_identifier":"prod-eu/pay roll""#), "accepted"),
        (&with(r#","source_key_identifier":"pay roll""#), "invalid_value"),
        (&with(r#","source_key_tier":"moon""#), "unknown_tier"),
        (&with(r#","source_key_identifier":"""#), "invalid_value"),
        (&with(r#","key_expiration":true"#), "valid_to_missing"),
        (&with(r#","valid_to":"2026-12-04T06:51:18Z""#), "valid_to_without_expiration"),
        (&with(r#","key_expiration":true,"valid_to":"2026-11-24T11:59:59Z""#), "valid_to_past"),
        (&with(too_far), "valid_to_too_far"),
        (&with(r#","key_expiration":true,"valid_to":"tomorrow""#), "invalid_value"),
        (&with(r#","wrapping_algorithm":"RSAES_PKCS1_V1_5""#), "invalid_value"),
        (&with(r#","wrapping_key_spec":"RSA_1024""#), "invalid_value"),
        (&with(r#","key_material_description":"a;b""#), "invalid_value"),
        (&with(r#","expect_current_material":"abc""#), "invalid_value"),
        (&with(r#","not_before":"2027-01-24T11:59:59Z""#), "invalid_value"),
        (&with(r#","deadline":"2026-11-24T11:59:59Z""#), "invalid_value"),
        (&with(r#","batch":"a b""#), "invalid_value"),
        (&with(r#","dry_run":true"#), "accepted"),
        (&with(r#","dry_run":"yes""#), "wrong_type"),
        (&with(r#","urgent":true"#), "field_not_allowed"),
        (&with(r#","operation":"import","urgent":true"#), "field_not_allowed"),
        (&with(r#","operation":"delete","urgent":true"#), "accepted"),
        (&with(r#","operation":"delete","urgent":"yes""#), "wrong_type"),
        (&with(r#","key_material_id":"abc""#), "invalid_value"),
        (&with(r#","scope":"all""#), "field_not_allowed"),
        (&with(r#","operation":"delete","scope":"all""#), "accepted"),
        (&with(r#","operation":"delete","scope":"some""#), "invalid_value"),
        (&with(&format!(r#","operation":"delete","key_material_id":"{MATERIAL}""#)), "accepted"),
        (
            &with(&format!(r#","operation":"delete","key_material_id":"{MATERIAL}","scope":"current""#)),
            "field_not_allowed",
        ),
        (&with(r#","operation":"delete","source_key_tier":"local""#), "field_not_allowed"),
        (&with(r#","operation":"delete","source_key_identifier":"k""#), "field_not_allowed"),
        (&with(r#","operation":"delete","key_expiration":false"#), "field_not_allowed"),
        (&with(r#","operation":"delete","valid_to":"2026-12-04T06:51:18Z""#), "field_not_allowed"),
        (&with(r#","operation":"delete","wrapping_algorithm":"RSAES_OAEP_SHA_256""#), "field_not_allowed"),
        (&with(r#","operation":"delete","wrapping_key_spec":"RSA_4096""#), "field_not_allowed"),
        (&with(r#","operation":"delete","key_material_description":"d""#), "field_not_allowed"),
        (&with(r#","dry_run":false,"urgent":false"#), "accepted"),
    ] {
        assert_eq!(code(body), expected, "{body}");
    }
}

#[test]
fn a_body_that_is_too_large_or_not_utf8_is_refused() {
    let of = |body: &[u8]| Request::parse(Envelope { body, content_type: None, message_id: None }).unwrap_err();
    assert_eq!(of(&vec![b' '; MAX_BODY_BYTES + 1]).refusal.code, RefusalCode::BodyTooLarge);
    assert_eq!(of(b"{\"id\":\"\xff\"}").refusal.code, RefusalCode::NotUtf8);
}

#[test]
fn no_value_is_repeated_in_a_refusal() {
    let secret = "c2VjcmV0LWJ5dGVz";
    for body in [
        with(&format!(r#","material":"{secret}""#)),
        with(&format!(r#","{secret}=":"x""#)),
        with(&format!(r#","valid_to":"{secret}""#)),
        with(&format!(r#","key_expiration":"{secret}""#)),
        format!(r#"{{"id":"{secret}!","key":"x"}}"#),
        format!(r#"{{"id":"a","key":"{secret}"}}"#),
        format!("{{\"id\":\"{secret}"),
    ] {
        let rejected = parse(&body).unwrap_err();
        assert!(!format!("{rejected:?}").contains(secret), "{rejected:?}");
    }
}

#[test]
fn a_rejected_message_keeps_its_usable_id_and_key() {
    let rejected = parse(&with(r#","colour":"red""#)).unwrap_err();
    assert_eq!(rejected.id.unwrap().as_str(), "a");
    assert_eq!(rejected.key.unwrap().to_string(), ARN);
}

#[test]
fn equality_is_that_of_the_parsed_fields_that_were_given() {
    let digest = |extra: &str| parse(&with(extra)).unwrap().digest();
    let plain = digest("");
    assert_eq!(plain, parse(&format!(r#" {{ "key" : "{ARN}", "id":"a" }}"#)).unwrap().digest());
    assert_ne!(plain, digest(r#","operation":"import""#));
    assert_eq!(
        digest(r#","key_expiration":true,"valid_to":"2026-12-04T06:51:18Z""#),
        digest(r#","valid_to":"2026-12-04T07:51:18.000+01:00","key_expiration":true"#),
    );
}

#[test]
fn a_delete_names_what_it_deletes() {
    let work = |extra: &str| parse(&with(&format!(r#","operation":"delete"{extra}"#))).unwrap().work;
    assert_eq!(work(""), Work::Delete(DeleteTarget::Current));
    assert_eq!(work(r#","scope":"current""#), Work::Delete(DeleteTarget::Current));
    assert_eq!(work(r#","scope":"all""#), Work::Delete(DeleteTarget::All));
    let one = format!(r#","key_material_id":"{MATERIAL}""#);
    assert_eq!(work(&one), Work::Delete(DeleteTarget::Material(MATERIAL.into())));
}

#[test]
fn a_dry_run_is_another_request_than_the_real_one_and_stays_one_when_it_is_read_again() {
    let (real, dry) = (parse(&with(r#","dry_run":false"#)).unwrap(), parse(&with(r#","dry_run":true"#)).unwrap());
    assert_ne!(real.digest(), dry.digest());
    assert_eq!(real.digest(), parse(&with("")).unwrap().digest(), "as it was before there were dry runs");
    let again = Request::from_canonical(dry.canonical(), dry.id.clone(), String::new()).unwrap();
    assert!(again.dry_run);
    assert_eq!(again.first_call(), ScarceCall::Nothing);
}

#[test]
fn a_cloudevents_envelope_is_opened_and_its_id_and_source_count() {
    let envelope = |body: &str| {
        Request::parse(Envelope {
            body: body.as_bytes(),
            content_type: Some("application/cloudevents+json; charset=utf-8"),
            message_id: Some("from-amqp"),
        })
    };
    let request = envelope(&format!(
        r#"{{"specversion":"1.0","id":"ce-1","source":"/payroll","type":"t","partitionkey":"x","data":{{"key":"{ARN}"}}}}"#
    ))
    .unwrap();
    assert_eq!(request.id.as_str(), "ce-1");
    assert_eq!(request.source, "/payroll");
    let rejected =
        envelope(&format!(r#"{{"specversion":"0.3","id":"x","source":"s","type":"t","data":{{"key":"{ARN}"}}}}"#));
    assert_eq!(rejected.unwrap_err().refusal.code, RefusalCode::InvalidEnvelope);
    let rejected = envelope(r#"{"specversion":"1.0","id":"x","source":"s","type":"t","data":"text"}"#).unwrap_err();
    assert_eq!(rejected.refusal.code, RefusalCode::InvalidEnvelope);
}

#[test]
fn the_transports_message_id_stands_in() {
    let body = format!(r#"{{"key":"{ARN}"}}"#);
    let request =
        Request::parse(Envelope { body: body.as_bytes(), content_type: None, message_id: Some("m-1") }).unwrap();
    assert_eq!(request.id.as_str(), "m-1");
}

#[test]
fn patience_is_counted_from_the_start_of_the_job() {
    let deadline = |extra: &str| parse(&with(extra)).unwrap().deadline_from(NOW);
    assert_eq!(deadline(r#","not_before":"2026-11-30T12:00:00Z""#), datetime!(2026-12-03 12:00 UTC));
    assert_eq!(deadline(r#","not_before":"2026-10-01T12:00:00Z""#), datetime!(2026-11-27 12:00 UTC));
    assert_eq!(deadline(r#","deadline":"2026-11-25T12:00:00Z""#), datetime!(2026-11-25 12:00 UTC));
}

#[test]
fn patience_is_at_most_ninety_days_from_the_start_of_the_job() {
    parse(&with(r#","deadline":"2027-02-22T12:00:00Z""#)).unwrap();
    parse(&with(r#","not_before":"2026-11-30T12:00:00Z","deadline":"2027-02-28T12:00:00Z""#)).unwrap();
    for late in [
        r#","deadline":"2027-02-22T12:00:01Z""#,
        r#","deadline":"9999-12-31T23:59:59Z""#,
        r#","not_before":"2026-11-30T12:00:00Z","deadline":"2027-02-28T12:00:01Z""#,
    ] {
        let refusal = parse(&with(late)).unwrap_err().refusal;
        assert_eq!((refusal.code.as_str(), refusal.field.as_deref()), ("invalid_value", Some("deadline")));
        assert!(refusal.message.contains("at most 90 days"), "{}", refusal.message);
    }
}

#[test]
fn two_sources_are_two_namespaces_of_ids() {
    let id = RequestId::parse("a").unwrap();
    assert_ne!(id_hash("", &id), id_hash("/payroll", &id));
}

proptest! {
    #[test]
    fn any_bytes_are_accepted_or_refused_without_a_panic(body in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _read = Request::parse(Envelope { body: &body, content_type: None, message_id: Some("m") });
        let envelope = Envelope { body: &body, content_type: Some(CONTENT_TYPE_CLOUDEVENTS), message_id: None };
        let _read = Request::parse(envelope);
    }

    #[test]
    fn the_canonical_form_is_read_back_as_the_same_request(
        name in "[A-Za-z0-9._:-]{1,128}",
        expires in any::<bool>(),
        ahead in 1_i64..31_000_000,
        description in proptest::option::of("[a-zA-Z0-9:/_. -]{1,200}"),
    ) {
        let valid_to = (NOW + Duration::seconds(ahead)).format(&Rfc3339).unwrap();
        let mut fields = serde_json::json!({"id": "a", "key": ARN, "source_key_identifier": name, "key_expiration": expires});
        if expires { fields["valid_to"] = valid_to.into(); }
        if let Some(text) = description { fields["key_material_description"] = text.into(); }
        let request = parse(&fields.to_string()).unwrap();
        let again = Request::from_canonical(request.canonical(), request.id.clone(), String::new()).unwrap();
        prop_assert_eq!(again, request);
    }
}
