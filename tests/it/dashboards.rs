//! Dashboards, alerts and runbook, held together; and every query of them run by a real Prometheus that has scraped a
//! working worker.

use crate::support::process::Process;
use crate::support::world::{Tuning, World, request};
use crate::support::{eventually, http};
use keyferry::job::FailureCode;
use keyferry::telemetry::Metrics;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Of KMIP servers, of which this worker has none.
const WITHOUT_DATA: &str = "keyferry_dsm_";

fn ops() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("ops")
}

fn read(name: &str) -> String {
    std::fs::read_to_string(ops().join(name)).unwrap()
}

/// A dashboard's or an alert's query, with where it stands.
struct Query {
    place: String,
    text: String,
}

fn panels() -> Vec<Query> {
    let mut found = Vec::new();
    for file in std::fs::read_dir(ops().join("grafana/dashboards")).unwrap() {
        let path = file.unwrap().path();
        let board: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        for panel in board["panels"].as_array().unwrap() {
            for target in panel["targets"].as_array().into_iter().flatten() {
                assert_eq!(target["datasource"]["uid"], "keyferry-prometheus", "{}", path.display());
                let text = target["expr"].as_str().unwrap().replace("$__rate_interval", "1m");
                found.push(Query { place: format!("{}: {}", path.display(), panel["title"]), text });
            }
        }
    }
    assert!(found.len() > 40, "the dashboards were not found");
    found
}

fn alerts() -> Vec<String> {
    let names = read("prometheus/alerts.yml");
    names.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).map(str::to_owned).collect()
}

/// Selectors of our own metrics in a query, matchers included.
fn selectors(query: &str) -> Vec<String> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    query
        .match_indices("keyferry_")
        .filter(|(at, _)| !query[..*at].ends_with(is_name))
        .map(|(at, _)| {
            let rest = &query[at..];
            let name = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
            let end = match rest[name..].strip_prefix('{') {
                Some(matchers) => name + 2 + matchers.find('}').unwrap(),
                None => name,
            };
            rest[..end].to_owned()
        })
        .collect()
}

/// A private Prometheus with the alerts of `ops/`, and a target.
struct Prometheus {
    _process: Process,
    url: String,
    client: reqwest::Client,
}

impl Prometheus {
    async fn start(directory: &Path, target: &str) -> Self {
        let rules = ops().join("prometheus/alerts.yml").display().to_string();
        let config = format!(
            "global: {{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}}\nrule_files: [{rules:?}]\n\
             scrape_configs: [{{job_name: keyferry, static_configs: [{{targets: [{target:?}]}}]}}]\n"
        );
        std::fs::write(directory.join("prometheus.yml"), config).unwrap();
        let mut command = Command::new("prometheus");
        command
            .arg(format!("--config.file={}", directory.join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", directory.join("prometheus").display()))
            .arg("--web.listen-address=127.0.0.1:0");
        let mut process = Process::start(&mut command, directory.join("prometheus.log"));
        // It does not say which port it was given.
        let port = eventually("Prometheus listens", || {
            let (ended, log, port) = (process.ended(), process.log(), process.listens_on());
            async move {
                assert!(ended.is_none(), "Prometheus ended:\n{log}");
                port
            }
        })
        .await;
        let (url, client) = (format!("http://127.0.0.1:{port}"), http());
        eventually("Prometheus is ready", || {
            let (ended, log) = (process.ended(), process.log());
            let asked = client.get(format!("{url}/-/ready")).send();
            async move {
                assert!(ended.is_none(), "Prometheus ended:\n{log}");
                asked.await.ok().filter(|answer| answer.status() == 200).map(drop)
            }
        })
        .await;
        Self { _process: process, url, client }
    }

    /// An answer of its API.
    async fn get(&self, page: &str, query: &[(&str, &str)]) -> Value {
        let url = url::Url::parse_with_params(&format!("{}/api/v1/{page}", self.url), query).unwrap();
        self.client.get(url).send().await.unwrap().json().await.unwrap()
    }

    /// The result of an instant query.
    async fn ask(&self, place: &str, query: &str) -> Vec<Value> {
        let answer = self.get("query", &[("query", query)]).await;
        assert_eq!(answer["status"], "success", "{place}: {query}: {answer}");
        match answer["data"]["resultType"].as_str().unwrap() {
            "vector" => answer["data"]["result"].as_array().unwrap().clone(),
            _ => vec![answer["data"]["result"].clone()],
        }
    }

    /// Waits until a query has a result: a scrape that came too late leaves a gap until the next.
    async fn find(&self, place: &str, query: &str) {
        let found = async || self.ask(place, query).await;
        if query.contains(WITHOUT_DATA) {
            found().await;
            return;
        }
        eventually(&format!("{place}: data for {query}"), || async { (!found().await.is_empty()).then_some(()) }).await;
    }
}

#[tokio::test]
async fn every_query_finds_what_it_asks_for() {
    let mut world = World::with_worker(Tuning::default()).await;
    world.symmetric_key("payroll").await;
    let arn = world.fake.key().await;
    world.publish(request("r1", &arn, json!({"source_key_identifier": "payroll"}))).await;
    world.succeeded("r1").await;
    let prometheus = Prometheus::start(world.path("").as_path(), world.workers[0].address()).await;
    let series = "sum_over_time(up[1m]) > 2 and on () keyferry_store_sampled_timestamp_seconds > 0";
    eventually("it was scraped some times", || async {
        (!prometheus.ask("start", series).await.is_empty()).then_some(())
    })
    .await;

    for Query { place, text } in panels() {
        prometheus.find(&place, &text).await;
    }
    let rules = prometheus.get("rules", &[]).await;
    let rules = rules["data"]["groups"][0]["rules"].as_array().unwrap().clone();
    assert_eq!(rules.len(), alerts().len());
    let mut queries = panels();
    for rule in &rules {
        assert_ne!(rule["health"], "err", "{rule}");
        let (name, text) = (rule["name"].as_str().unwrap(), rule["query"].as_str().unwrap());
        prometheus.ask(name, text).await;
        queries.push(Query { place: name.to_owned(), text: text.to_owned() });
    }
    // A label's value that does not exist would be quiet for ever. The series of closed sets are all there.
    let selected: BTreeSet<(String, String)> = queries
        .iter()
        .flat_map(|query| selectors(&query.text).into_iter().map(|one| (one, query.place.clone())))
        .collect();
    for (selector, place) in selected.iter().filter(|(selector, _)| !selector.starts_with(WITHOUT_DATA)) {
        prometheus.find(place, selector).await;
    }
    drop(prometheus);
    world.finish().await;
}

#[test]
fn queries_name_metrics_that_there_are() {
    let known: BTreeSet<String> = Metrics::new()
        .unwrap()
        .families()
        .iter()
        .flat_map(|family| match family.kind {
            "histogram" => ["_bucket", "_sum", "_count"].map(|end| format!("{}{end}", family.name)).to_vec(),
            _ => vec![family.name.clone()],
        })
        .collect();
    let texts = panels().into_iter().map(|query| query.text).chain([read("prometheus/alerts.yml")]);
    let named: BTreeSet<String> = texts
        .flat_map(|text| selectors(&text))
        .map(|selector| selector.split('{').next().unwrap().to_owned())
        .collect();
    let unknown: Vec<&String> = named.difference(&known).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}

/// `metric{label=~"one|other"}`: the metric and its label, with the words.
fn choices(query: &str) -> Vec<(String, BTreeSet<String>)> {
    let mut found = Vec::new();
    for selector in selectors(query) {
        let Some((metric, matchers)) = selector.split_once('{') else { continue };
        for matcher in matchers.trim_end_matches('}').split(',') {
            if let Some((label, words)) = matcher.split_once("=~") {
                let words = words.trim_matches('"').split('|').map(str::to_owned).collect();
                found.push((format!("{metric} {label}"), words));
            }
        }
    }
    found
}

#[test]
fn panels_show_all_of_what_the_alerts_of_the_same_count() {
    let alerts = choices(&read("prometheus/alerts.yml"));
    let mut compared = 0;
    for Query { place, text } in panels() {
        for (of, shown) in choices(&text) {
            let same = |alert: &&(String, BTreeSet<String>)| alert.0 == of && !alert.1.is_disjoint(&shown);
            for (_, counted) in alerts.iter().filter(same) {
                assert_eq!(&shown, counted, "{place}");
                compared += 1;
            }
        }
    }
    assert!(compared >= 2, "no panel shows what an alert counts");
}

#[test]
fn the_panel_of_decisions_shows_every_end_that_somebody_decided() {
    let panel = panels().into_iter().find(|query| query.place.contains("Jobs ended by operators and policy")).unwrap();
    let decided = [
        FailureCode::Abandoned,
        FailureCode::Cancelled,
        FailureCode::ReplicaNotAllowed,
        FailureCode::Revoked,
        FailureCode::TargetRemoved,
    ];
    let decided = decided.iter().map(|code| code.as_str().to_owned()).collect();
    assert_eq!(choices(&panel.text), [("keyferry_jobs_finished_total code".to_owned(), decided)]);
}

#[test]
fn each_alert_has_its_entry_and_its_test() {
    let (rules, runbook, tests) =
        (read("prometheus/alerts.yml"), read("runbook.md"), read("prometheus/alerts_test.yml"));
    let entries: BTreeSet<String> =
        runbook.lines().filter_map(|line| line.strip_prefix("## ")).map(str::to_owned).collect();
    assert_eq!(entries, alerts().into_iter().collect());
    for (name, rule) in alerts().iter().zip(rules.split("- alert: ").skip(1)) {
        let anchor = format!("runbook_url: ops/runbook.md#{}", name.to_lowercase());
        for line in [anchor.as_str(), "summary: ", "description: ", "severity: "] {
            assert!(rule.contains(line), "{name} has no {line}");
        }
        assert!(tests.contains(&format!("- name: {name}\n")), "{name} has no test");
    }
}

#[test]
fn rules_are_valid_and_fire_when_they_should() {
    for arguments in
        [["check", "rules", "alerts.yml"], ["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]]
    {
        let ran = Command::new("promtool").args(arguments).current_dir(ops().join("prometheus")).output();
        let ran = ran.expect("promtool comes with the package prometheus: ops/test installs it");
        let said = [ran.stdout, ran.stderr].concat();
        assert!(ran.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&said));
    }
}
