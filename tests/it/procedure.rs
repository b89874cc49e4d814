//! AWS's own client and OpenSSL, by AWS's published procedure, against the double: what it is like from outside.

use crate::support::fake::Fake;
use crate::support::variable;
use std::process::Command;

#[tokio::test]
async fn awss_own_client_imports_material_by_awss_own_procedure() {
    let directory = tempfile::tempdir().unwrap();
    let fake = Fake::start(directory.path()).await;
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_kms/procedure.sh");
    let mut command = Command::new("bash");
    command
        .arg(script)
        .env("AWS_CLI", variable("KEYFERRY_TEST_AWS_CLI"))
        .env("PYTHON", variable("KEYFERRY_TEST_PYTHON"))
        .env("FAKE_KMS_URL", fake.url())
        .env("NO_PROXY", "127.0.0.1");
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.trim_end().ends_with("procedure ok"),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
