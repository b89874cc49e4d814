//! The settings of the dsm tier, and the command that tries them.

use crate::support::keyferry;
use crate::support::kmip::{address, file, registered, settings};
use keyferry::config::DsmConnection;
use keyferry::source::Dsm;
use keyferry::telemetry::Metrics;
use serde_json::Value;
use std::collections::BTreeMap;
use std::process::{Command, Stdio};

#[test]
fn what_is_wrong_with_the_files_names_setting_and_file() {
    let wrong = |settings: DsmConnection| {
        let connections = BTreeMap::from([("prod".to_owned(), settings)]);
        Dsm::new(&connections, None, &Metrics::new().unwrap()).unwrap_err().to_string()
    };
    let usual = || settings(&["127.0.0.1:1"], "client");
    for (settings, setting, path) in [
        (DsmConnection { ca_file: file("none.crt"), ..usual() }, "dsm.prod.ca_file", "none.crt"),
        (DsmConnection { ca_file: file("client.key"), ..usual() }, "dsm.prod.ca_file", "client.key"),
        (DsmConnection { cert_file: file("client.key"), ..usual() }, "dsm.prod.cert_file", "client.key"),
        (DsmConnection { key_file: file("client.crt"), ..usual() }, "dsm.prod.key_file", "client.crt"),
        (DsmConnection { key_file: file("other.key"), ..usual() }, "dsm.prod.key_file", "other.key"),
        (DsmConnection { server_name: Some("a b".into()), ..usual() }, "dsm.prod.server_name", "DNS name"),
    ] {
        let error = wrong(settings);
        assert!(error.contains(setting) && error.contains(path), "{error}");
    }
}

fn check(servers: &[&str], client: &str, arguments: &[&str]) -> (Option<i32>, String, String) {
    let directory = tempfile::tempdir().unwrap();
    let servers = servers.iter().map(|server| format!("\"{server}\"")).collect::<Vec<_>>().join(", ");
    let text = format!(
        "[dsm.prod]\nservers = [{servers}]\nca_file = \"{}\"\ncert_file = \"{}\"\nkey_file = \"{}\"\n",
        file("ca.crt").display(),
        file(&format!("{client}.crt")).display(),
        file(&format!("{client}.key")).display(),
    );
    std::fs::write(directory.path().join("keyferry.toml"), text).unwrap();
    let ran = Command::new(keyferry())
        .current_dir(directory.path())
        .args(["source", "check", "dsm"])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (ran.status.code(), text(ran.stdout), text(ran.stderr))
}

#[test]
fn one_command_says_whether_a_connection_works_and_what_it_sees() {
    let server = address();
    let (id, holds) = registered("p256");
    let (code, out, err) = check(&[&server], "client", &["--key", "p256", "--kind", "ECC_NIST_P256"]);
    assert_eq!(code, Some(0), "{out}{err}");
    for said in
        [&format!("{server}: works; KMIP 2.0, TLSv1_2, certificate localhost until"), "sees 29 objects", &id, "(p256)"]
    {
        assert!(out.contains(said), "{said}: {out}");
    }
    let scalar = hex::encode(&holds[36..68]);
    let (code, out, _) =
        check(&[&server], "client", &["prod", "--key", "prod/p256", "--kind", "ECC_NIST_P256", "--json"]);
    let report: Value = serde_json::from_str(&out).unwrap();
    assert!(code == Some(0) && report["ok"] == true && report["key"]["usable"] == true, "{out}");
    assert_eq!(report["servers"][0]["details"]["kmip_version"], "2.0");
    assert!(!out.contains(&scalar));
    let (code, out, _) = check(&[&server], "client", &["--key", "p256", "--kind", "RSA_2048", "--json"]);
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &report["key"]["error"]["code"]), (Some(1), &Value::from("source_key_wrong_kind")), "{out}");
    // Each server is looked at, also behind one that works.
    let (code, out, _) = check(&[&server, "127.0.0.1:1"], "client", &[]);
    assert!(code == Some(1) && out.contains("works") && out.contains("127.0.0.1:1: does not work"), "{out}");
    let (code, out, _) = check(&[&server], "expired", &[]);
    assert!(code == Some(1) && out.contains("CertificateExpired") && out.contains("cert_file"), "{out}");
    let (code, _, err) = check(&[&server], "client", &["stage", "--json"]);
    assert!(code == Some(1) && err.contains("dsm_connection_unknown"), "{err}");
    let (code, _, err) = check(&[&server], "nobody", &[]);
    assert!(code == Some(2) && err.contains("dsm.prod.cert_file") && err.contains("nobody.crt"), "{err}");
    let (code, _, err) = check(&[&server], "client", &["--key", "p256"]);
    assert!(code == Some(2) && err.contains("--kind"), "{err}");
}

#[test]
fn settings_are_checked_with_the_files_that_they_name() {
    let directory = tempfile::tempdir().unwrap();
    let check = |ca_file: &str, further: &str| {
        let text = format!(
            "policy = \"allow-all\"\n[database]\nurl = \"postgres://u@h/d\"\n[rabbitmq]\nurl = \"amqp://h\"\n[keys]\nkek = \"{}\"\n\
             [[targets]]\naccount = \"111122223333\"\nregions = [\"eu-central-1\"]\n\
             [dsm.prod]\nservers = [\"127.0.0.1\"]\nca_file = \"{}\"\ncert_file = \"{}\"\nkey_file = \"{}\"\n{further}",
            "00".repeat(32),
            file(ca_file).display(),
            file("client.crt").display(),
            directory.path().join("client.key").display(),
        );
        std::fs::write(directory.path().join("keyferry.toml"), text).unwrap();
        let mut command = Command::new(keyferry());
        let ran = command.current_dir(directory.path()).args(["config", "check"]).output().unwrap();
        (ran.status.code(), String::from_utf8(ran.stderr).unwrap())
    };
    let key = directory.path().join("client.key");
    std::fs::copy(file("client.key"), &key).unwrap();
    assert_eq!(check("ca.crt", ""), (Some(0), String::new()));
    let (code, err) = check("none.crt", "");
    assert!(code == Some(2) && err.contains("dsm.prod.ca_file") && err.contains("none.crt"), "{err}");
    let (code, err) = check("ca.crt", "protocol = \"3.0\"");
    assert!(code == Some(2) && err.contains("prod") && err.contains("2.0"), "{err}");
    std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let (code, err) = check("ca.crt", "");
    assert!(code == Some(0) && err.contains("dsm.prod.key_file is open to more than its owner"), "{err}");
}
