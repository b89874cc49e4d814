use super::*;
use crate::job::{KeyArn, Request, RequestId};
use crate::policy::{Ask, Policy, Source, Verdict, changes};
use proptest::prelude::*;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::macros::datetime;

const ARN: &str = "arn:aws:kms:eu-central-1:111122223333:key/031c5703-aaf7-425e-a141-7e0c6f5886ab";
const NOW: OffsetDateTime = datetime!(2026-11-24 12:00 UTC);
/// From RFC 8410, 10.1.
const PEM: &str = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\n-----END PUBLIC KEY-----";
const PRINCIPALS: &str =
    "[principals.payroll]\nrabbitmq_users = [\"payroll\"]\n[principals.other]\nrabbitmq_users = [\"o\"]\n";

fn rules(text: &str) -> Result<Book, PolicyError> {
    read(&format!("{PRINCIPALS}{text}"))
}

fn rule(more: &str) -> String {
    format!("[[rules]]\nname = \"r\"\nprincipals = [\"payroll\"]\noperations = [\"import\"]\n{more}\n")
}

fn named(name: &str, more: &str) -> String {
    rule(more).replace("\"r\"", &format!("\"{name}\""))
}

fn policy(text: &str) -> Policy {
    Policy::Rules(Box::new(rules(text).unwrap()))
}

fn request(more: &Value) -> Request {
    let mut fields = json!({"key": ARN});
    fields.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    Request::from_canonical(&fields.to_string(), RequestId::parse("r").unwrap(), String::new()).unwrap()
}

fn judged(policy: &Policy, principal: &str, more: &Value) -> Verdict {
    let (request, key) = (request(more), KeyArn::parse(ARN).unwrap());
    policy.judge(&Ask::of(principal, &request, &key, None, NOW))
}

fn allows(policy: &Policy, more: &Value) -> bool {
    matches!(judged(policy, "payroll", more), Verdict::Allowed(_))
}

#[test]
fn what_is_wrong_is_said_with_its_place() {
    let key =
        |id: &str| format!("[[principals.payroll.signing_keys]]\nid = \"{id}\"\npublic_key = \"\"\"{PEM}\"\"\"\n");
    let cases: Vec<(&str, usize, String)> = vec![
        ("policy_empty", 1, String::new()),
        ("policy_empty", 1, "# nothing but a remark\n".into()),
        ("no_rules", 1, PRINCIPALS.into()),
        ("policy_unreadable", 1, "colour = 1".into()),
        ("policy_unreadable", 5, format!("{PRINCIPALS}colour = 1\n")),
        ("policy_unreadable", 9, format!("{PRINCIPALS}{}", rule("colour = 1"))),
        ("policy_unreadable", 2, "\n[principals.payroll\n".into()),
        ("name_reserved", 1, format!("[principals.anonymous]\nrabbitmq_users = [\"a\"]\n{}", rule(""))),
        ("name_reserved", 1, format!("[principals.unidentified]\nrabbitmq_users = [\"a\"]\n{}", rule(""))),
        ("value_wrong", 1, format!("[principals.\"a b\"]\nrabbitmq_users = [\"a\"]\n{}", rule(""))),
        ("principal_unreachable", 1, format!("[principals.payroll]\n{}", rule(""))),
        ("identity_twice", 6, format!("{PRINCIPALS}[principals.third]\nrabbitmq_users = [\"o\"]\n{}", rule(""))),
        ("value_wrong", 2, format!("[principals.payroll]\nsqs_roles = [\"payroll\"]\n{}", rule(""))),
        ("value_wrong", 2, format!("[principals.payroll]\nrabbitmq_users = [\"\"]\n{}", rule(""))),
        ("identity_twice", 9, format!("[principals.payroll]\n{}{}{}", key("a"), key("b"), rule(""))),
        ("value_wrong", 4, format!("[principals.payroll]\n{}{}", key("a").replace("MCow", "MCox"), rule(""))),
        ("principal_unknown", 7, format!("{PRINCIPALS}{}", rule("").replace("[\"payroll\"]", "[\"nobody\"]"))),
        ("value_wrong", 8, format!("{PRINCIPALS}{}", rule("").replace("import", "explode"))),
        ("value_wrong", 9, format!("{PRINCIPALS}{}", rule("accounts = [\"1111\"]"))),
        ("value_wrong", 9, format!("{PRINCIPALS}{}", rule("tiers = [\"moon\"]"))),
        ("value_wrong", 9, format!("{PRINCIPALS}{}", rule("keys = [\"031c5703*\"]"))),
        ("value_wrong", 9, format!("{PRINCIPALS}{}", rule("regions = [\"\"]"))),
        ("value_wrong", 9, format!("{PRINCIPALS}{}", rule("regions = [\"eu-*\", \"eu-*\"]"))),
        ("value_wrong", 9, format!("{PRINCIPALS}{}", rule("expiry = \"maybe\""))),
        ("value_wrong", 10, format!("{PRINCIPALS}{}", rule("expiry = \"required\"\nlongest_validity = \"30\""))),
        ("value_wrong", 10, format!("{PRINCIPALS}{}", rule("expiry = \"required\"\nlongest_validity = \"0d\""))),
        ("value_wrong", 10, format!("{PRINCIPALS}{}", rule("expiry = \"required\"\nlongest_validity = \"99999d\""))),
        ("condition_without_effect", 9, format!("{PRINCIPALS}{}", rule("longest_validity = \"30d\""))),
        ("condition_without_effect", 9, format!("{PRINCIPALS}{}", rule("urgent = true"))),
        ("condition_without_effect", 9, format!("{PRINCIPALS}{}", rule("shortest_rotation_interval = \"2h\""))),
        (
            "condition_without_effect",
            9,
            format!("{PRINCIPALS}{}", rule("tiers = [\"dsm\"]").replace("import", "delete")),
        ),
        ("rule_unreachable", 9, format!("{PRINCIPALS}{}", rule("keys = []"))),
        (
            "rule_unreachable",
            6,
            format!("{PRINCIPALS}{}", rule("accounts = [\"111122223333\"]\nkeys = [\"arn:aws:kms:*:444455556666:*\"]")),
        ),
        ("rule_unreachable", 6, format!("{PRINCIPALS}{}", rule("regions = [\"eu-*\"]\nkeys = [\"arn:aws:kms:us-*\"]"))),
        ("rule_name_twice", 11, format!("{PRINCIPALS}{}{}", rule(""), rule(""))),
        ("rule_unreachable", 11, format!("{PRINCIPALS}{}{}", rule(""), named("second", "regions = [\"eu-*\"]"))),
    ];
    for (code, line, text) in cases {
        let error = read(&text).unwrap_err();
        assert_eq!((error.code, error.line), (code, line), "{text}\n{error}");
        assert!(error.to_string().starts_with(&format!("line {line}: ")), "{error}");
    }
}

#[test]
fn a_rule_that_several_before_it_cover_together_is_unreachable() {
    let both = rule("regions = [\"eu-*\"]").replace("[\"payroll\"]", "[\"payroll\", \"other\"]");
    let before = format!("{}{}", named("a", ""), named("b", "").replace("payroll", "other"));
    let error = rules(&format!("{before}{both}")).unwrap_err();
    assert!(error.code == "rule_unreachable" && error.to_string().contains("\"a\", \"b\""), "{error}");
    // Wider in one way: its deletes are reached.
    assert!(rules(&format!("{before}{}", both.replace("[\"import\"]", "[\"import\", \"delete\"]"))).is_ok());
    // A generated key is not one that has a name.
    let sources = |list: &str| format!("source_keys = {list}");
    assert!(rules(&format!("{}{}", named("a", &sources("[\"pay*\"]")), rule(&sources("[\"<generated>\"]")))).is_ok());
    assert!(rules(&format!("{}{}", named("a", &sources("[\"pay*\"]")), rule(&sources("[\"pay/*\"]")))).is_ok());
    let covered = format!("{}{}", named("a", &sources("[\"*\"]")), rule(&sources("[\"<generated>\", \"x/y\"]")));
    assert_eq!(rules(&covered).unwrap_err().code, "rule_unreachable");
}

#[test]
fn rules_that_overlap_with_other_conditions_are_warned_of() {
    let narrow = named("narrow", "regions = [\"eu-*\"]\nexpiry = \"required\"");
    let wide = named("wide", "");
    let warnings = rules(&format!("{narrow}{wide}")).unwrap().warnings;
    assert!(warnings[0].contains("\"narrow\"") && warnings[0].contains("\"wide\""), "{warnings:?}");
    assert!(warnings[0].contains("expiry"), "{warnings:?}");
    assert!(warnings[1].contains("other"), "no rule is for it: {warnings:?}");
    let apart = named("apart", "regions = [\"us-*\"]\nexpiry = \"required\"");
    let elsewhere = rule("regions = [\"eu-*\"]");
    assert_eq!(rules(&format!("{apart}{elsewhere}")).unwrap().warnings.len(), 1);
}

#[test]
fn the_first_rule_that_fits_decides_alone() {
    let narrow = named("narrow", "source_keys = [\"payroll-*\"]\nexpiry = \"required\"\nlongest_validity = \"30d\"");
    let policy = policy(&format!("{narrow}{}", named("wide", "")));
    let payroll = json!({"source_key_identifier": "payroll-1"});
    assert!(
        matches!(judged(&policy, "payroll", &payroll), Verdict::Denied { rule: Some(rule), .. } if rule == "narrow")
    );
    let expiring = |at: &str| json!({"source_key_identifier": "payroll-1", "key_expiration": true, "valid_to": at});
    assert!(allows(&policy, &expiring("2026-12-24T12:00:00Z")));
    assert!(!allows(&policy, &expiring("2026-12-24T12:00:01Z")));
    assert!(allows(&policy, &json!({"source_key_identifier": "other"})));
    // Which key it is will be seen: either may decide.
    let open = json!({"source_key_identifier": "031c5703-aaf7-425e-a141-7e0c6f5886ab"});
    assert!(matches!(judged(&policy, "payroll", &open), Verdict::Allowed(grant) if grant.rule.is_none()));
    let (asked, key) = (request(&open), KeyArn::parse(ARN).unwrap());
    let known = Ask::of("payroll", &asked, &key, None, NOW).with_source(Source::Named {
        tier: "local",
        name: "payroll-1",
        id: None,
    });
    assert!(matches!(policy.judge(&known), Verdict::Denied { .. }));
}

#[test]
fn source_keys_are_judged_by_tier_and_name() {
    let with = |list: &str| policy(&rule(&format!("source_keys = {list}")));
    let generated = json!({});
    let local = json!({"source_key_identifier": "prod"});
    let (asked, key) = (request(&generated), KeyArn::parse(ARN).unwrap());
    let dsm = |policy: &Policy, name: &str, id: &str| {
        let source = Source::Named { tier: "dsm", name, id: Some(id) };
        matches!(policy.judge(&Ask::of("payroll", &asked, &key, None, NOW).with_source(source)), Verdict::Allowed(_))
    };
    for (list, generates, takes_local, takes_dsm) in [
        ("[\"*\"]", true, true, true),
        ("[\"<generated>\"]", true, false, false),
        ("[\"p*\"]", false, true, false),
        ("[\"p*/*\"]", false, false, true),
        // An identifier is meant only when it is spelt out.
        ("[\"prod/7\"]", false, false, true),
        ("[\"prod/?\"]", false, false, false),
    ] {
        let policy = with(list);
        assert_eq!(allows(&policy, &generated), generates, "{list}");
        assert_eq!(allows(&policy, &local), takes_local, "{list}");
        assert_eq!(dsm(&policy, "prod/payroll", "prod/7"), takes_dsm, "{list}");
    }
    let deletes = policy(&rule("source_keys = [\"p*\"]").replace("[\"import\"]", "[\"import\", \"delete\"]"));
    assert!(allows(&deletes, &json!({"operation": "delete"})), "a delete has no source key");
}

#[test]
fn what_is_new_is_told() {
    let before = policy(&format!("{}{}", named("a", ""), named("b", "").replace("payroll", "other")));
    let after = policy(&format!("{}{}", named("a", "tiers = [\"local\"]"), named("c", "").replace("payroll", "other")));
    let change = changes(&before, &after);
    assert_eq!((change.added, change.removed), (vec!["rule \"c\"".to_owned()], vec!["rule \"b\"".to_owned()]));
    assert_eq!(change.changed, ["rule \"a\""]);
}

#[test]
fn it_is_explained_in_plain_words() {
    let text = rule("regions = [\"eu-*\"]\nexpiry = \"required\"\nlongest_validity = \"30d\"");
    let lines = policy(&text).explain();
    assert!(lines.iter().any(|line| line == "payroll is rabbitmq:payroll"), "{lines:#?}");
    let rule = lines.iter().find(|line| line.starts_with("1. \"r\"")).unwrap();
    for words in ["payroll may import", "Region eu-*", "any account", "material must expire, after 30d at most"] {
        assert!(rule.contains(words), "{rule}");
    }
}

proptest! {
    #[test]
    fn whoever_no_rule_is_for_may_nothing(principal in "[a-z]{1,9}", source in "[a-z-]{1,9}") {
        let policy = policy(&rule("source_keys = [\"payroll-*\"]"));
        let asked = json!({"source_key_identifier": source});
        let is_allowed = matches!(judged(&policy, &principal, &asked), Verdict::Allowed(_));
        prop_assert_eq!(is_allowed, principal == "payroll" && source.starts_with("payroll-"));
    }

    #[test]
    fn reading_never_panics(text in "(\\[\\[rules\\]\\]|name|=|\"[a-z]{0,3}\"|\\[|\\]|\n|\\PC){0,40}") {
        drop(read(&text));
    }
}
