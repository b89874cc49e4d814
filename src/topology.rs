//! The broker's default topology: data in `ops/rabbitmq/definitions.json`, applied and compared over the
//! management API. A passive AMQP declaration sees neither a queue's type nor its policies; this does.

use reqwest::{Client, StatusCode};
use rustls::ClientConfig;
use serde_json::Value;
use url::Url;

/// The topology as `RabbitMQ` definitions of one virtual host.
pub const DEFINITIONS: &str = include_str!("../ops/rabbitmq/definitions.json");

/// Why the management API was of no use.
#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    /// Not a URL.
    #[error("rabbitmq.api_url is not understood: expected http://user:password@host:15672")]
    ApiUrl,
    /// No connection.
    #[error("RabbitMQ's management API does not answer: {0}")]
    Unreachable(String),
    /// An answer that refuses.
    #[error("RabbitMQ's management API refuses ({status}): {reason}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// Its words.
        reason: String,
    },
    /// The definitions are not JSON: a fault of the build.
    #[error("the definitions are damaged: {0}")]
    Definitions(#[from] serde_json::Error),
}

/// A difference between the broker and the definitions.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Difference {
    /// `queue`, `exchange`, `binding`, `policy`, `user` or `shovel`.
    pub kind: &'static str,
    /// Its name.
    pub name: String,
    /// What is wrong.
    pub problem: String,
}

/// What the settings call the broker's ends.
#[derive(Clone, Copy, Debug)]
pub struct Names<'a> {
    /// `rabbitmq.queue`.
    pub queue: &'a str,
    /// `rabbitmq.dead_letter_queue`.
    pub dead_letter_queue: &'a str,
    /// `rabbitmq.exchange`.
    pub exchange: &'a str,
}

/// The management API of one virtual host.
#[derive(Debug)]
pub struct Management {
    client: Client,
    base: Url,
    user: String,
    password: String,
    vhost: String,
}

impl Management {
    /// From the API's URL. An `https` one is trusted as the broker is.
    pub fn new(api_url: &str, vhost: &str, tls: &ClientConfig) -> Result<Self, TopologyError> {
        let mut base = Url::parse(api_url).map_err(|_| TopologyError::ApiUrl)?;
        let decoded = |text: &str| percent_decoded(text);
        let (user, password) = (decoded(base.username()), decoded(base.password().unwrap_or("")));
        // Credentials go into a header, not into a URL that an error could show.
        base.set_username("").map_err(|()| TopologyError::ApiUrl)?;
        base.set_password(None).map_err(|()| TopologyError::ApiUrl)?;
        let client = Client::builder()
            .timeout(std::time::Duration::from_secs(10))
            .tls_backend_preconfigured(tls.clone())
            .build()
            .map_err(|error| TopologyError::Unreachable(error.to_string()))?;
        Ok(Self { client, base, user, password, vhost: vhost.to_owned() })
    }

    /// Brings the definitions in. What is there already stays; a queue of another type is not changed by this.
    pub async fn apply(&self) -> Result<(), TopologyError> {
        let definitions: Value = serde_json::from_str(DEFINITIONS)?;
        let url = self.url(&["api", "definitions", &self.vhost])?;
        let request = self.client.post(url).json(&definitions);
        self.send(request).await.map(drop)
    }

    /// Compares every queue, exchange, binding and policy of the definitions with the broker's, and sees whether the
    /// queues and the exchange of the settings are there. Those that are not of the definitions are not looked into, but
    /// for what would let dead letters be lost.
    pub async fn check(&self, settings: &Names<'_>) -> Result<Vec<Difference>, TopologyError> {
        let wanted: Value = serde_json::from_str(DEFINITIONS)?;
        let request = self.client.get(self.url(&["api", "definitions", &self.vhost])?);
        let present = self.send(request).await?;
        let mut found = differences(&wanted, &present);
        found.extend(missing_names(settings, &wanted, &present));
        found.extend(lossy(settings.dead_letter_queue, &self.queues().await?, &present));
        Ok(found)
    }

    /// Users with rights on the virtual host who may publish in the name of any other: where the broker's word says who
    /// sends, each of them is everybody.
    pub async fn impersonators(&self) -> Result<Vec<Difference>, TopologyError> {
        let users = self.send(self.client.get(self.url(&["api", "users"])?)).await?;
        let rights = self.client.get(self.url(&["api", "vhosts", &self.vhost, "permissions"])?);
        let rights = self.send(rights).await?;
        Ok(impersonators(&users, &rights))
    }

    /// Shovels that write into the virtual host and leave no mark on what they pass on: a shovel that logs in as nobody, as by
    /// default, keeps a `user-id` that was compared elsewhere, or nowhere. Only those that this broker runs are known here.
    pub async fn shovels(&self) -> Result<Vec<Difference>, TopologyError> {
        let asked = self.client.get(self.url(&["api", "parameters", "shovel"])?);
        match self.send(asked).await {
            Ok(found) => Ok(shovels(&found, &self.vhost)),
            // Without the plugin there are none.
            Err(TopologyError::Refused { status: 404, .. }) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// The tags of a user.
    pub async fn user_tags(&self, user: &str) -> Result<Vec<String>, TopologyError> {
        let found = self.send(self.client.get(self.url(&["api", "users", user])?)).await?;
        Ok(tags(&found))
    }

    /// Queues with the names of the policies in force. Without statistics, which come only seconds after a change.
    async fn queues(&self) -> Result<Value, TopologyError> {
        let mut url = self.url(&["api", "queues", &self.vhost])?;
        url.set_query(Some("disable_stats=true&enable_queue_totals=true"));
        self.send(self.client.get(url)).await
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> Result<Value, TopologyError> {
        let unreachable = |error: reqwest::Error| TopologyError::Unreachable(innermost(&error.without_url()));
        let answer = request.basic_auth(&self.user, Some(&self.password)).send().await.map_err(unreachable)?;
        let status = answer.status();
        let text = answer.text().await.map_err(unreachable)?;
        if !status.is_success() {
            let reason = match status {
                StatusCode::UNAUTHORIZED => {
                    "user or password is wrong, or the user lacks the tag administrator".to_owned()
                }
                _ => text.chars().take(300).collect(),
            };
            return Err(TopologyError::Refused { status: status.as_u16(), reason });
        }
        if text.is_empty() { Ok(Value::Null) } else { Ok(serde_json::from_str(&text)?) }
    }

    fn url(&self, path: &[&str]) -> Result<Url, TopologyError> {
        let mut url = self.base.clone();
        url.path_segments_mut().map_err(|()| TopologyError::ApiUrl)?.pop_if_empty().extend(path);
        Ok(url)
    }
}

/// Looks at one letter that lose it nothing, for as long as anybody keeps letters.
const ENOUGH_LOOKS: u64 = 1_000_000;

/// Whether looking at a queue's letters would in the end lose them. Of several policies that fit, only one is in force,
/// which need not be the one that is meant for the queue.
fn lossy(name: &str, queues: &Value, definitions: &Value) -> Option<Difference> {
    let queue = queues.as_array()?.iter().find(|queue| queue["name"] == name && queue["type"] == "quorum")?;
    let policy = each(definitions, "policies").find(|policy| policy["name"] == queue["policy"]);
    let limit = policy.map_or(&Value::Null, |policy| &policy["definition"]["delivery-limit"]);
    if limit.as_u64().is_some_and(|limit| limit >= ENOUGH_LOOKS) {
        return None;
    }
    let limit = if limit.is_null() { "not set, which is 20 from RabbitMQ 4 on".to_owned() } else { limit.to_string() };
    let problem = format!(
        "its delivery-limit in force is {limit}: each keyferry dead list counts as a delivery, and letters over the limit \
         are dropped; give it a policy with 1000000000"
    );
    Some(Difference { kind: "queue", name: name.to_owned(), problem })
}

/// reqwest's own words say nothing of why.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

/// Names in the settings that the default topology does not have, as `setting = name`.
pub fn own_names(settings: &Names<'_>) -> Result<Vec<String>, TopologyError> {
    let wanted: Value = serde_json::from_str(DEFINITIONS)?;
    let own = names(settings).into_iter().filter(|named| !has(&wanted, named.list, named.name));
    Ok(own.map(|named| format!("rabbitmq.{} = {}", named.setting, named.name)).collect())
}

/// A name of the settings.
struct Named<'a> {
    setting: &'static str,
    kind: &'static str,
    /// Where it stands in definitions.
    list: &'static str,
    name: &'a str,
}

fn names<'a>(settings: &Names<'a>) -> [Named<'a>; 3] {
    let Names { queue, dead_letter_queue, exchange } = *settings;
    [
        Named { setting: "queue", kind: "queue", list: "queues", name: queue },
        Named { setting: "dead_letter_queue", kind: "queue", list: "queues", name: dead_letter_queue },
        Named { setting: "exchange", kind: "exchange", list: "exchanges", name: exchange },
    ]
}

/// What the definitions have is compared with them already.
fn missing_names(settings: &Names<'_>, wanted: &Value, present: &Value) -> Vec<Difference> {
    let missing = names(settings)
        .into_iter()
        .filter(|named| !has(wanted, named.list, named.name) && !has(present, named.list, named.name));
    missing
        .map(|Named { kind, name, .. }| Difference { kind, name: name.to_owned(), problem: "is missing".into() })
        .collect()
}

fn shovels(parameters: &Value, vhost: &str) -> Vec<Difference> {
    let all = parameters.as_array().into_iter().flatten();
    let found = all.filter(|shovel| {
        let value = &shovel["value"];
        let uris: Vec<&Value> = match &value["dest-uri"] {
            Value::Array(uris) => uris.iter().collect(),
            uri => vec![uri],
        };
        let own = shovel["vhost"].as_str().unwrap_or_default();
        let is_marked = value["dest-add-forward-headers"] == true || value["add-forward-headers"] == true;
        !is_marked && uris.iter().any(|uri| is_into(uri.as_str().unwrap_or_default(), own, vhost))
    });
    found
        .map(|shovel| Difference {
            kind: "shovel",
            name: format!("{} of virtual host {}", text(&shovel["name"]), text(&shovel["vhost"])),
            problem: "writes into this virtual host and may pass messages on in any user's name: set its \
                      dest-add-forward-headers to true, or let signatures prove who sends"
                .into(),
        })
        .collect()
}

/// Whether a shovel's URI may lead into a virtual host. One without a path leads into the default one, by some protocols into
/// the shovel's own, and one that is not understood may lead anywhere. The broker's own name cannot be told from others.
fn is_into(uri: &str, own: &str, vhost: &str) -> bool {
    let Some((_, rest)) = uri.split_once("://") else { return true };
    let place = rest.split(['?', '#']).next().unwrap_or_default();
    match place.split_once('/') {
        Some((_, path)) => percent_decoded(path) == vhost,
        None => own == vhost || vhost == "/",
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn impersonators(users: &Value, rights: &Value) -> Vec<Difference> {
    let all = |list: &'_ Value| list.as_array().cloned().unwrap_or_default();
    let with_rights: Vec<Value> = all(rights).iter().map(|right| right["user"].clone()).collect();
    let is_impersonator = |user: &Value| tags(user).iter().any(|tag| tag == "impersonator");
    let found = all(users).into_iter().filter(|user| is_impersonator(user) && with_rights.contains(&user["name"]));
    found
        .map(|user| Difference {
            kind: "user",
            name: user["name"].as_str().unwrap_or_default().to_owned(),
            problem: "has the tag impersonator, and can send in any other user's name: take the tag away".into(),
        })
        .collect()
}

fn tags(user: &Value) -> Vec<String> {
    let text = |tag: &Value| tag.as_str().unwrap_or_default().trim().to_owned();
    match &user["tags"] {
        Value::Array(tags) => tags.iter().map(text).collect(),
        // As older brokers write it.
        tags => tags.as_str().unwrap_or_default().split(',').map(|tag| tag.trim().to_owned()).collect(),
    }
}

fn has(definitions: &Value, list: &str, name: &str) -> bool {
    each(definitions, list).any(|one| one["name"] == name)
}

fn percent_decoded(text: &str) -> String {
    url::form_urlencoded::parse(format!("x={}", text.replace('+', "%2B")).as_bytes())
        .next()
        .map(|(_, value)| value.into_owned())
        .unwrap_or_default()
}

fn differences(wanted: &Value, present: &Value) -> Vec<Difference> {
    let mut found = Vec::new();
    for (list, kind, parts) in [
        ("queues", "queue", ["durable", "arguments"].as_slice()),
        ("exchanges", "exchange", &["type", "durable"]),
        ("policies", "policy", &["pattern", "apply-to", "priority", "definition"]),
    ] {
        for item in each(wanted, list) {
            let name = item["name"].as_str().unwrap_or_default();
            let problem = match each(present, list).find(|other| other["name"] == item["name"]) {
                None => Some("is missing".to_owned()),
                Some(other) => parts
                    .iter()
                    .find(|part| !contains(&other[**part], &item[**part]))
                    .map(|part| format!("{part} is {}, expected {}", other[*part], item[*part])),
            };
            found.extend(problem.map(|problem| Difference { kind, name: name.to_owned(), problem }));
        }
    }
    let ends = ["source", "destination", "destination_type", "routing_key"];
    for binding in each(wanted, "bindings") {
        if !each(present, "bindings").any(|other| ends.iter().all(|end| other[*end] == binding[*end])) {
            let text = |end: &str| binding[end].as_str().unwrap_or_default().to_owned();
            let name = format!("{} -> {}", text("source"), text("destination"));
            found.push(Difference { kind: "binding", name, problem: "is missing".into() });
        }
    }
    found
}

fn each<'a>(definitions: &'a Value, list: &str) -> impl Iterator<Item = &'a Value> {
    definitions[list].as_array().into_iter().flatten()
}

/// Whether `present` has all of `wanted`; a broker adds defaults of its own.
fn contains(present: &Value, wanted: &Value) -> bool {
    match (present, wanted) {
        (Value::Object(present), Value::Object(wanted)) => {
            wanted.iter().all(|(name, value)| present.get(name).is_some_and(|other| contains(other, value)))
        }
        _ => present == wanted,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls;
    use serde_json::json;

    #[test]
    fn shovels_that_leave_no_mark_in_the_virtual_host_are_found() {
        let shovel = |name: &str, vhost: &str, value: Value| json!({"name": name, "vhost": vhost, "value": value});
        let all = json!([
            shovel("own", "a", json!({"dest-uri": "amqp://"})),
            shovel("by-path", "b", json!({"dest-uri": ["amqps://u:p@host/x", "amqp:///a?heartbeat=5"]})),
            shovel("unread", "b", json!({"dest-uri": {}})),
            shovel("elsewhere", "a", json!({"dest-uri": "amqp:///b"})),
            shovel("others", "b", json!({"dest-uri": "amqp://localhost"})),
            shovel("marked", "a", json!({"dest-uri": "amqp://", "dest-add-forward-headers": true})),
            shovel("marked-of-old", "a", json!({"dest-uri": "amqp://", "add-forward-headers": true})),
        ]);
        let names = |vhost: &str| shovels(&all, vhost).into_iter().map(|one| one.name).collect::<Vec<_>>();
        let found = ["own of virtual host a", "by-path of virtual host b", "unread of virtual host b"];
        assert_eq!(names("a"), found);
        assert!(shovels(&json!([]), "a").is_empty());
        let slash = json!([shovel("s", "b", json!({"dest-uri": "amqp://host/%2f"}))]);
        assert_eq!(shovels(&slash, "/").len(), 1);
        assert!(names("/").iter().any(|name| name.starts_with("others")), "without a path: {:?}", names("/"));
    }

    #[test]
    fn whoever_may_send_as_anybody_is_found() {
        let users = serde_json::json!([
            {"name": "a", "tags": ["monitoring", "impersonator"]}, {"name": "b", "tags": "monitoring, impersonator"},
            {"name": "c", "tags": ["monitoring"]}, {"name": "d", "tags": ["impersonator"]}, {"name": "e", "tags": ""},
        ]);
        let rights = serde_json::json!([{"user": "a"}, {"user": "b"}, {"user": "c"}, {"user": "e"}]);
        let found = impersonators(&users, &rights);
        assert_eq!(found.iter().map(|one| one.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn the_definitions_agree_with_themselves_and_every_part_is_compared() {
        let wanted: Value = serde_json::from_str(DEFINITIONS).unwrap();
        assert_eq!(differences(&wanted, &wanted), []);
        let count: usize =
            ["queues", "exchanges", "policies", "bindings"].iter().map(|list| each(&wanted, list).count()).sum();
        assert_eq!(differences(&wanted, &serde_json::json!({})).len(), count);
        let mut classic = wanted.clone();
        classic["queues"][0]["arguments"]["x-queue-type"] = "classic".into();
        let found = differences(&wanted, &classic);
        assert!(found.len() == 1 && found[0].problem.contains("arguments"), "{found:?}");
    }

    #[test]
    fn names_of_the_settings_are_looked_for_when_they_are_not_the_definitions() {
        let wanted: Value = serde_json::from_str(DEFINITIONS).unwrap();
        let settings =
            Names { queue: "keyferry.jobs", dead_letter_queue: "keyferry.dead", exchange: "keyferry.events" };
        assert_eq!(own_names(&settings).unwrap(), [""; 0]);
        assert_eq!(missing_names(&settings, &wanted, &serde_json::json!({})), []);
        let settings = Names { queue: "q", dead_letter_queue: "d", exchange: "x" };
        assert_eq!(
            own_names(&settings).unwrap(),
            ["rabbitmq.queue = q", "rabbitmq.dead_letter_queue = d", "rabbitmq.exchange = x"]
        );
        let found = missing_names(&settings, &wanted, &serde_json::json!({"queues": [{"name": "q"}]}));
        let missing = |kind, name: &str| Difference { kind, name: name.to_owned(), problem: "is missing".into() };
        assert_eq!(found, [missing("queue", "d"), missing("exchange", "x")]);
    }

    #[test]
    fn a_dead_letter_queue_has_to_bear_being_looked_at() {
        let definitions = json!({"policies": [
            {"name": "high", "definition": {"delivery-limit": 1_000_000_000}},
            {"name": "low", "definition": {"delivery-limit": 20}},
            {"name": "other", "definition": {}},
        ]});
        let of = |kind: &str, policy: &str| {
            let queues = json!([{"name": "other"}, {"name": "d", "type": kind, "policy": policy}]);
            lossy("d", &queues, &definitions).map(|found| found.problem)
        };
        assert_eq!(of("quorum", "high"), None);
        assert_eq!(of("classic", "low"), None);
        assert!(of("quorum", "low").unwrap().contains("is 20:"));
        assert!(of("quorum", "other").unwrap().contains("not set"));
        assert!(lossy("d", &json!([{"name": "d", "type": "quorum"}]), &definitions).is_some());
        assert_eq!(lossy("d", &json!([]), &definitions), None);
    }

    #[test]
    fn credentials_leave_the_url_and_paths_are_encoded() {
        let tls = tls::client_config(None).unwrap();
        let management = Management::new("http://u:p%40x@h:1", "/", &tls).unwrap();
        assert_eq!((management.user.as_str(), management.password.as_str()), ("u", "p@x"));
        let url = management.url(&["api", "definitions", "/"]).unwrap();
        assert_eq!(url.as_str(), "http://h:1/api/definitions/%2F");
    }
}
