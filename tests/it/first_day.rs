//! What an operator types first: settings, health, an export of the trail, completions.

use crate::support::fake::{ACCOUNT, REGION};
use crate::support::variable;
use crate::support::world::{Ran, Tuning, World, request};
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

#[track_caller]
fn ended(ran: &Ran, code: i32, says: &str) {
    assert!(
        ran.code == Some(code) && format!("{}{}", ran.out, ran.err).contains(says),
        "expected {code}, {says}: {ran:?}"
    );
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

#[tokio::test]
async fn a_worker_starts_with_the_first_settings_once_their_places_are_filled_in() {
    let mut world = World::new(Tuning::default()).await;
    let dir = world.path("new");
    let ran = world.run(&["init", "--dir", "new", "--json"]).await;
    ended(&ran, 0, "");
    let (settings, policy, kek) = (dir.join("keyferry.toml"), dir.join("policy.toml"), dir.join("kek"));
    assert_eq!((mode(&dir), mode(&settings), mode(&kek)), (0o700, 0o600, 0o600));
    let said = ran.json();
    let places: Vec<&str> =
        said["fill_in"].as_array().unwrap().iter().map(|place| place["setting"].as_str().unwrap()).collect();
    assert_eq!(places, ["database.url", "rabbitmq.url", "targets.account", "targets.regions"]);
    assert!(!ran.out.contains(read(&kek).trim()), "the key was printed");

    // As they are they name the first place.
    let config = settings.display().to_string();
    let check = async |world: &World| {
        // The world's own settings are named before the command.
        let mut command = rebuilt(&world.command(), &["--config", &config, "config", "check"]);
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ran { code: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) }
    };
    let named = check(&world).await;
    ended(&named, 2, "targets.account");
    assert!(named.err.contains(&config), "{named:?}");
    let mut lines: Vec<String> = read(&settings).lines().map(str::to_owned).collect();
    let mut fill = |setting: &str, line: String| {
        let place = said["fill_in"].as_array().unwrap().iter().find(|place| place["setting"] == setting).unwrap();
        lines[usize::try_from(place["line"].as_u64().unwrap()).unwrap() - 1] = line;
    };
    fill(
        "database.url",
        format!(
            "connect_timeout_ms = 30000\nurl = {:?}\nca_file = {:?}",
            world.db.worker_url(),
            variable("KEYFERRY_TEST_POSTGRES_CA")
        ),
    );
    fill("rabbitmq.url", format!("url = {:?}", world.vhost.url()));
    fill("targets.account", format!("account = {ACCOUNT:?}"));
    fill("targets.regions", format!("regions = [{REGION:?}]"));
    std::fs::write(&settings, lines.join("\n")).unwrap();
    let checked = check(&world).await;
    ended(&checked, 0, "the settings are complete");
    assert_eq!(checked.err, "");
    // The policy to begin with speaks of a user whom this broker does not have; the rest is what a worker starts with.
    let text = read(&settings).replacen("policy = \"policy.toml\"", "policy = \"allow-all\"", 1);
    let text = text.replacen("#listen = \"127.0.0.1:9464\"", "listen = \"127.0.0.1:0\"", 1);
    world.write("keyferry.toml", &text.replacen("#format = \"human\"", "format = \"json\"", 1));
    assert!(read(&policy).contains("[principals.example]"));
    world.serve().await;
    world.fake.key().await;
    world.workers[0].stop().await;
}

/// The same program and environment with other arguments.
fn rebuilt(command: &std::process::Command, arguments: &[&str]) -> std::process::Command {
    let mut other = std::process::Command::new(command.get_program());
    other.env_clear().args(arguments);
    other.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    other
}

#[tokio::test]
async fn nothing_is_overwritten_unasked_and_a_key_never() {
    let world = World::new(Tuning::default()).await;
    ended(&world.run(&["init", "--dir", "new"]).await, 0, "line");
    let (settings, policy, kek) =
        (world.path("new/keyferry.toml"), world.path("new/policy.toml"), world.path("new/kek"));
    let key = read(&kek);
    for present in [&settings, &policy] {
        std::fs::write(&settings, "mine").unwrap();
        std::fs::write(&policy, "mine").unwrap();
        let other = if present == &settings { &policy } else { &settings };
        std::fs::remove_file(other).unwrap();
        let refused = world.run(&["init", "--dir", "new", "--json"]).await;
        ended(&refused, 1, "file_exists");
        assert!(!other.exists() && read(present) == "mine", "{refused:?}");
    }
    std::os::unix::fs::symlink("/no/such/file", &settings).unwrap_or(());
    let forced = world.run(&["init", "--dir", "new", "--force", "--json"]).await;
    ended(&forced, 0, "");
    assert_eq!(forced.json()["kept"], json!([kek]));
    assert_eq!(read(&kek), key);
    assert!(read(&settings).contains("FILL IN") && !settings.is_symlink());
    assert_eq!(mode(&settings), 0o600);
    assert_eq!(std::fs::read_dir(world.path("new")).unwrap().count(), 3, "something was left");
    // Without a key it is a place like others.
    let without = world.run(&["init", "--dir", "none", "--no-kek", "--json"]).await;
    ended(&without, 0, "keys.kek_file");
    assert!(!world.path("none/kek").exists());
    ended(&world.run(&["init", "--dir", "keyferry.toml"]).await, 1, "keyferry.toml");
}

#[tokio::test]
async fn health_is_what_the_worker_says() {
    let mut world = World::with_worker(Tuning::default()).await;
    let address = world.workers[0].address().to_owned();
    let at = [("KEYFERRY_ADMIN__LISTEN", address.as_str())];
    let ready = world.run_with(&["health"], &at, "").await;
    ended(&ready, 0, "ready");
    ended(&world.run_with(&["health", "--live"], &at, "").await, 0, "ok");
    // A proxy of the environment is not asked.
    let proxied = [at[0], ("http_proxy", "http://127.0.0.1:1"), ("HTTP_PROXY", "http://127.0.0.1:1")];
    ended(&world.run_with(&["health"], &proxied, "").await, 0, "ready");
    let everywhere = format!("0.0.0.0:{}", address.rsplit_once(':').unwrap().1);
    ended(&world.run_with(&["health"], &[("KEYFERRY_ADMIN__LISTEN", everywhere.as_str())], "").await, 0, "ready");
    world.vhost.delete_queue(crate::support::broker::JOBS).await;
    crate::support::eventually("the worker is not ready", async || {
        world.workers[0].ready().await.filter(|(status, _)| *status == 503)
    })
    .await;
    let missing = world.run_with(&["health", "--json"], &at, "").await;
    ended(&missing, 1, "not_ready");
    assert_eq!(missing.json()["missing"], json!(["rabbitmq ingress"]));
    ended(&world.run_with(&["health", "--live"], &at, "").await, 0, "ok");
    world.workers[0].stop().await;
    ended(&world.run_with(&["health", "--json"], &at, "").await, 1, "no_worker");
    // No database is needed, and no broker: there are none at these addresses.
    ended(&world.run(&["health"]).await, 2, "admin.listen");
}

#[tokio::test]
async fn a_stranger_on_the_port_is_no_worker_and_one_that_is_silent_is_not_waited_for() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let world = World::new(Tuning::default()).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let at = [("KEYFERRY_ADMIN__LISTEN", address.as_str())];
    let begun = Instant::now();
    let silent = world.run_with(&["health", "--timeout", "1s", "--json"], &at, "").await;
    ended(&silent, 1, "no_answer");
    assert!(begun.elapsed() < Duration::from_secs(20));
    let answers = tokio::spawn(async move {
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nConnection: close\r\n\r\n\x1b[31mready";
        while let Ok((mut socket, _)) = listener.accept().await {
            // What is closed with a question unread is reset, and the answer may be lost with it.
            drop(socket.read(&mut [0; 4_096]).await);
            drop(socket.write_all(answer).await);
        }
    });
    let strange = world.run_with(&["health", "--json"], &at, "").await;
    ended(&strange, 1, "not_a_worker");
    assert!(!strange.out.contains('\x1b'));
    answers.abort();
}

#[tokio::test]
async fn the_trail_is_exported_byte_for_byte_and_goes_on_where_it_broke_off() {
    let mut world = World::with_worker(Tuning::default()).await;
    world.symmetric_key("payroll").await;
    let arn = world.fake.key().await;
    world.publish(request("one", &arn, json!({"source_key_identifier": "payroll"}))).await;
    let job = world.succeeded("one").await;
    let rows = "select entry from audit_entry order by subject, n";
    let recorded: Vec<String> = world.client.query(rows, &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
    assert!(recorded.len() > 5);
    let all = world.run(&["audit", "export"]).await;
    ended(&all, 0, "entries, up to");
    assert_eq!(all.out, recorded.join("\n") + "\n");
    // The last whole line says its own position.
    let third: Value = serde_json::from_str(&recorded[2]).unwrap();
    let position = format!("{}/{}", third["subject"].as_str().unwrap(), third["n"]);
    let rest = world.run(&["audit", "export", "--after", &position, "--json"]).await;
    ended(&rest, 0, "");
    assert_eq!(rest.out, recorded[3..].join("\n") + "\n");
    assert_eq!(rest.err, "");
    let own = world.run(&["audit", "export", "--job", &job.id.to_string()]).await;
    let own: Vec<Value> = own.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(own[0]["kind"], "accepted");
    assert_eq!(own.last().unwrap()["kind"], "succeeded");
    assert!(own.iter().all(|entry| entry["subject"] == job.id.to_string()));
    let at = own[0]["at"].as_str().unwrap();
    let before = world.run(&["audit", "export", "--until", at, "--job", &job.id.to_string()]).await;
    assert_eq!((before.code, before.out.as_str()), (Some(0), ""));
    let since = world.run(&["audit", "export", "--since", at, "--job", &job.id.to_string()]).await;
    assert_eq!(since.out.lines().count(), own.len());
    assert_eq!(world.run(&["audit", "export", "--since", "0s"]).await.out, "");
    ended(&world.run(&["audit", "export", "--after", "third"]).await, 2, "SUBJECT/N");
    // An entry that is two lines would be one that nobody wrote.
    let forged = "insert into audit_entry (subject, n, entry)
                  values ('ffffffff-ffff-7fff-8fff-ffffffffffff', 1, E'{\"at\":\"x\"}\\n{\"at\":\"y\"}')";
    world.client.batch_execute(forged).await.unwrap();
    let damaged = world.run(&["audit", "export", "--json"]).await;
    ended(&damaged, 1, "audit_entry_damaged");
    assert_eq!(damaged.out, all.out);
}

#[tokio::test]
async fn completions_and_pages_are_made_without_settings() {
    let world = World::new(Tuning::default()).await;
    world.write("keyferry.toml", "colour = 1");
    for (shell, says) in [("bash", "complete -F"), ("zsh", "#compdef keyferry"), ("fish", "complete -c keyferry")] {
        let ran = world.run(&["completions", shell]).await;
        ended(&ran, 0, says);
        assert!(ran.out.contains("topology") && ran.out.contains("redrive"), "{shell}");
    }
    ended(&world.run(&["completions", "cmd"]).await, 2, "bash");
    ended(&world.run(&["man"]).await, 0, ".TH keyferry 1");
    let ran = world.run(&["man", "--dir", "man1", "--json"]).await;
    ended(&ran, 0, "keyferry-dead-redrive.1");
    let page = read(&world.path("man1/keyferry-dead-redrive.1"));
    assert!(page.contains("redrive") && page.contains("rate"), "{page}");
    ended(&world.run(&["man", "--dir", "man1"]).await, 0, "man1");
}

#[tokio::test]
async fn errors_at_start_name_the_setting_and_where_it_is_written() {
    let world = World::new(Tuning::default()).await;
    let settings = read(&world.path("keyferry.toml"));
    let file = world.path("keyferry.toml").display().to_string();
    let replaced = |from: &str, to: &str| {
        assert!(settings.contains(from), "{from}");
        world.write("keyferry.toml", &settings.replacen(from, to, 1));
    };
    replaced("lease_ms = 30000", "lease_ms = 1");
    let ran = world.run(&["serve"]).await;
    ended(&ran, 2, "worker.lease_ms");
    assert!(ran.err.contains(&file), "{ran:?}");
    replaced("filter = \"info,keyferry=debug\"", "filter = \"a=b=c\"");
    let ran = world.run(&["serve"]).await;
    ended(&ran, 2, "log.filter");
    assert!(ran.err.contains(&file), "{ran:?}");
    replaced("policy = \"allow-all\"", "policy = \"no-such.toml\"");
    let ran = world.run(&["serve"]).await;
    ended(&ran, 2, "no-such.toml");
    assert!(ran.err.contains(&file) && ran.err.contains("policy"), "{ran:?}");
    world.write("keyferry.toml", &settings);
    world.write("kek", "short");
    let ran = world.run(&["serve"]).await;
    ended(&ran, 2, "keys.kek_file");
    assert!(ran.err.contains(&file) && ran.err.contains("32 bytes"), "{ran:?}");
    world.write("kek", &"00".repeat(32));
    for (variable, value, code, named) in [
        ("KEYFERRY_WORKER__LEASE_MS", "1", 2, "worker.lease_ms"),
        ("KEYFERRY_DATABASE__URL", "nonsense", 2, "database.url"),
        ("KEYFERRY_DATABASE__URL", "postgres://u:p4ss@127.0.0.1:1/d", 1, "database.url"),
        ("KEYFERRY_DATABASE__CA_FILE", "/no/such/file", 2, "database.ca_file"),
        ("KEYFERRY_RABBITMQ__URL", "http://h", 2, "rabbitmq.url"),
    ] {
        let ran = world.run_with(&["serve"], &[(variable, value)], "").await;
        ended(&ran, code, named);
        assert!(ran.err.contains(variable), "{ran:?}");
        assert!(!ran.err.contains("p4ss"), "{ran:?}");
    }
    let ran = world.run_with(&["migrate"], &[("KEYFERRY_DATABASE__OWNER_URL", "nonsense")], "").await;
    ended(&ran, 2, "KEYFERRY_DATABASE__OWNER_URL");
}
