//! A virtual host of RabbitMQ for one test, and what is read and written there.

use super::{eventually, finish_blocking, http, variable};
use keyferry::amqp::Broker;
use keyferry::config::RabbitMq;
use keyferry::topology::Management;
use lapin::options::{
    BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueBindOptions, QueueDeclareOptions,
    QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection};
use reqwest::Method;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::OnceLock;
use url::Url;
use uuid::Uuid;

/// Where requests go.
pub const JOBS: &str = "keyferry.jobs";
/// Where refused messages go.
pub const DEAD: &str = "keyferry.dead";
/// Where events come from.
pub const EVENTS: &str = "keyferry.events";
/// The tests' own queue of events.
const PROBE: &str = "probe";

/// A message to be published.
#[expect(clippy::struct_field_names, reason = "AMQP's own name")]
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Message {
    /// The bytes.
    pub body: Vec<u8>,
    /// AMQP `content_type`.
    pub content_type: Option<String>,
    /// AMQP `message_id`.
    pub message_id: Option<String>,
    /// AMQP `user_id`.
    pub user_id: Option<String>,
    /// AMQP headers, or SQS's message attributes.
    pub headers: BTreeMap<String, String>,
}

impl Message {
    /// A request and nothing else.
    pub fn of(request: &Value) -> Self {
        Self { body: request.to_string().into_bytes(), ..Self::default() }
    }

    /// As a user says that it sends it.
    pub fn by(self, user: &str) -> Self {
        Self { user_id: Some(user.to_owned()), ..self }
    }

    /// With one more header.
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.insert(name.to_owned(), value.to_owned());
        self
    }

    fn properties(&self) -> BasicProperties {
        let mut properties = BasicProperties::default().with_delivery_mode(2);
        if let Some(content_type) = &self.content_type {
            properties = properties.with_content_type(content_type.as_str().into());
        }
        if let Some(id) = &self.message_id {
            properties = properties.with_message_id(id.as_str().into());
        }
        if let Some(user) = &self.user_id {
            properties = properties.with_user_id(user.as_str().into());
        }
        if self.headers.is_empty() {
            return properties;
        }
        let mut headers = FieldTable::default();
        for (name, value) in &self.headers {
            headers.insert(name.as_str().into(), AMQPValue::LongString(value.as_str().into()));
        }
        properties.with_headers(headers)
    }
}

/// What a user may on a virtual host, by names.
#[derive(Clone, Debug)]
pub struct Rights {
    /// What it may make.
    pub configure: String,
    /// What it may publish to.
    pub write: String,
    /// What it may consume.
    pub read: String,
}

impl Rights {
    /// Everything.
    pub fn all() -> Self {
        let all = || ".*".to_owned();
        Self { configure: all(), write: all(), read: all() }
    }

    /// Those that the manual tells operators to give to a worker.
    pub fn of_a_worker() -> Self {
        let manual = include_str!("../../../ops/manual/operating.md");
        let line = manual.lines().find_map(|line| line.strip_prefix("rabbitmqctl set_permissions -p / keyferry "));
        let quoted: Vec<&str> = line.expect("the manual says which rights").split('\'').collect();
        let [_, configure, _, write, _, read, _] = quoted.as_slice() else { panic!("three rights: {quoted:?}") };
        Self { configure: (*configure).to_owned(), write: (*write).to_owned(), read: (*read).to_owned() }
    }
}

/// A user of the broker with rights on one virtual host, deleted when it is dropped.
pub struct User {
    /// Its name, of its own on this broker.
    pub name: String,
    /// As whom it connects, and where.
    pub url: String,
    api: Url,
    channel: Channel,
    _connection: Connection,
}

impl User {
    /// Publishes to the queue of requests; whether the broker takes it.
    pub async fn publish(&self, message: &Message) -> Result<(), lapin::Error> {
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let sent = self.channel.basic_publish("".into(), JOBS.into(), options, &message.body, message.properties());
        let confirmation = sent.await?.await?;
        assert!(matches!(confirmation, Confirmation::Ack(None)), "{confirmation:?}");
        Ok(())
    }
}

impl Drop for User {
    fn drop(&mut self) {
        delete(&self.api, vec!["users".into(), self.name.clone()]);
    }
}

/// A message that was received.
#[derive(Clone, Debug)]
pub struct Received {
    /// The routing key.
    pub routing_key: String,
    /// The bytes.
    pub body: Vec<u8>,
    /// AMQP `message_id`.
    pub message_id: Option<String>,
    /// AMQP `content_type`.
    pub content_type: Option<String>,
    /// AMQP `delivery_mode`.
    pub delivery_mode: Option<u8>,
    /// The publisher's AMQP headers, or SQS's message attributes.
    pub headers: BTreeMap<String, String>,
    /// SQS's message group.
    pub group: Option<String>,
    /// Whether RabbitMQ had given it to somebody before.
    pub redelivered: bool,
}

impl Received {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// A virtual host, deleted when it is dropped.
pub struct Vhost {
    name: String,
    /// The broker's URL without a virtual host.
    amqp: String,
    api: Url,
    http: reqwest::Client,
    link: OnceLock<(Connection, Channel)>,
}

impl Vhost {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// An empty one on the broker of the run.
    pub async fn create() -> Self {
        Self::create_on(&variable("KEYFERRY_TEST_AMQP"), &variable("KEYFERRY_TEST_RABBITMQ_API")).await
    }

    /// An empty one on any broker, by its AMQP URL without a virtual host and that of its management API.
    pub async fn create_on(amqp: &str, api: &str) -> Self {
        let vhost = Self {
            name: format!("kf-test-{}", Uuid::new_v4().simple()),
            amqp: amqp.to_owned(),
            api: api.parse().unwrap(),
            http: http(),
            link: OnceLock::new(),
        };
        let user = vhost.api.username().to_owned();
        vhost.api(Method::PUT, &["vhosts", &vhost.name], None).await;
        let everything = json!({"configure": ".*", "write": ".*", "read": ".*"});
        vhost.api(Method::PUT, &["permissions", &vhost.name, &user], Some(everything)).await;
        vhost
    }

    /// The AMQP URL of this virtual host.
    pub fn url(&self) -> String {
        format!("{}/{}", self.amqp, self.name)
    }

    /// The management API of its broker.
    pub fn api_url(&self) -> &str {
        self.api.as_str()
    }

    /// The default topology.
    pub async fn apply_topology(&self) {
        let tls = keyferry::tls::client_config(None).unwrap();
        Management::new(self.api.as_str(), &self.name, &tls).unwrap().apply().await.unwrap();
    }

    /// The tests' own connection, and their queue of all events.
    pub async fn open(&self) {
        let broker = Broker::new(&RabbitMq::default(), &self.url()).unwrap();
        let connection = broker.connect("keyferry tests").await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        channel.queue_declare(PROBE.into(), durable, FieldTable::default()).await.unwrap();
        self.link.set((connection, channel)).unwrap_or_else(|_| panic!("opened twice"));
        self.bind("#").await;
    }

    /// Connects anew: the broker has closed all connections.
    pub async fn reopen(&mut self) {
        self.link = OnceLock::new();
        self.open().await;
    }

    /// Whether the broker says that it is short of memory.
    pub async fn is_short_of_memory(&self) -> bool {
        self.api(Method::GET, &["nodes"], None).await[0]["mem_alarm"] == true
    }

    /// The tests' own channel.
    pub fn channel(&self) -> &Channel {
        &self.link.get().expect("the virtual host is not open").1
    }

    /// Binds the tests' queue of events.
    pub async fn bind(&self, routing_key: &str) {
        let options = QueueBindOptions::default();
        let (queue, exchange) = (PROBE.into(), EVENTS.into());
        self.channel().queue_bind(queue, exchange, routing_key.into(), options, FieldTable::default()).await.unwrap();
    }

    /// Takes a binding of the tests' queue, or of another, away.
    pub async fn unbind(&self, queue: &str, routing_key: &str) {
        let exchange = EVENTS.into();
        self.channel().queue_unbind(queue.into(), exchange, routing_key.into(), FieldTable::default()).await.unwrap();
    }

    /// Takes the tests' own binding of all events away.
    pub async fn unbind_probe(&self) {
        self.unbind(PROBE, "#").await;
    }

    /// Publishes to the queue of requests and waits for the broker's confirmation.
    pub async fn publish(&self, message: &Message) {
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let properties = message.properties();
        let sent = self.channel().basic_publish("".into(), JOBS.into(), options, &message.body, properties);
        let confirmation = sent.await.unwrap().await.unwrap();
        assert!(matches!(confirmation, Confirmation::Ack(None)), "{confirmation:?}");
    }

    /// Takes everything out of the tests' queue of events.
    pub async fn take_events(&self) -> Vec<Received> {
        self.take(PROBE).await
    }

    /// Takes everything out of a queue.
    pub async fn take(&self, queue: &str) -> Vec<Received> {
        let mut taken = Vec::new();
        let options = BasicGetOptions { no_ack: true };
        while let Some(message) = self.channel().basic_get(queue.into(), options).await.unwrap() {
            let delivery = message.delivery;
            let properties = &delivery.properties;
            taken.push(Received {
                routing_key: delivery.routing_key.to_string(),
                message_id: properties.message_id().as_ref().map(ToString::to_string),
                content_type: properties.content_type().as_ref().map(ToString::to_string),
                delivery_mode: *properties.delivery_mode(),
                headers: headers(properties),
                group: None,
                redelivered: delivery.redelivered,
                body: delivery.data,
            });
        }
        taken
    }

    /// Messages that wait in a queue; those in the hands of a consumer are not counted.
    pub async fn ready(&self, queue: &str) -> u32 {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let declared = self.channel().queue_declare(queue.into(), passive, FieldTable::default()).await.unwrap();
        declared.message_count()
    }

    /// Makes a durable queue of a type.
    pub async fn declare_classic(&self, queue: &str) {
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        self.channel().queue_declare(queue.into(), durable, FieldTable::default()).await.unwrap();
    }

    /// Makes a policy.
    pub async fn set_policy(&self, name: &str, policy: Value) {
        self.api(Method::PUT, &["policies", &self.name, name], Some(policy)).await;
    }

    /// Makes a shovel.
    pub async fn set_shovel(&self, name: &str, value: Value) {
        self.api(Method::PUT, &["parameters", "shovel", &self.name, name], Some(json!({"value": value}))).await;
    }

    /// Deletes a queue.
    pub async fn delete_queue(&self, queue: &str) {
        self.channel().queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
    }

    /// Has the broker itself move dead letters back to the queue of requests, until it is told to stop.
    pub async fn move_dead_letters_back(&self, on: bool) {
        let path = ["policies", &self.name, "back"];
        if !on {
            self.api(Method::DELETE, &path, None).await;
            return;
        }
        let definition = json!({"message-ttl": 1, "dead-letter-exchange": "", "dead-letter-routing-key": JOBS});
        let policy =
            json!({"pattern": format!("^{DEAD}$"), "definition": definition, "priority": 200, "apply-to": "queues"});
        self.api(Method::PUT, &path, Some(policy)).await;
    }

    /// Makes a user who may do everything, with tags as the broker writes them.
    pub async fn user(&self, tags: &str) -> User {
        self.user_with(tags, &Rights::all()).await
    }

    /// Makes a user with these rights.
    pub async fn user_with(&self, tags: &str, Rights { configure, write, read }: &Rights) -> User {
        let name = format!("kf-{}", Uuid::new_v4().simple());
        self.api(Method::PUT, &["users", &name], Some(json!({"password": name, "tags": tags}))).await;
        let rights = json!({"configure": configure, "write": write, "read": read});
        self.api(Method::PUT, &["permissions", &self.name, &name], Some(rights)).await;
        let mut url: Url = self.url().parse().unwrap();
        url.set_username(&name).unwrap();
        url.set_password(Some(&name)).unwrap();
        let broker = Broker::new(&RabbitMq::default(), url.as_str()).unwrap();
        let connection = broker.connect("keyferry tests, a user").await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        User { name, url: url.into(), api: self.api.clone(), channel, _connection: connection }
    }

    /// Ends connections of the worker at the broker's side, as an operator or a failing node would.
    pub async fn cut_connections(&self, name: &str) {
        let found = eventually("the broker shows the connection", || async {
            let all = self.api(Method::GET, &["vhosts", &self.name, "connections"], None).await;
            let names: Vec<String> = all
                .as_array()?
                .iter()
                .filter(|one| one["client_properties"]["connection_name"] == name)
                .filter_map(|one| one["name"].as_str().map(str::to_owned))
                .collect();
            (!names.is_empty()).then_some(names)
        })
        .await;
        for connection in found {
            self.api(Method::DELETE, &["connections", &connection], None).await;
        }
    }

    async fn api(&self, method: Method, path: &[&str], body: Option<Value>) -> Value {
        let mut url = self.api.clone();
        url.set_username("").unwrap();
        url.set_password(None).unwrap();
        url.path_segments_mut().unwrap().pop_if_empty().push("api").extend(path);
        let mut request = self.http.request(method, url).basic_auth(self.api.username(), self.api.password());
        if let Some(body) = body {
            request = request.json(&body);
        }
        let answer = request.send().await.unwrap();
        let status = answer.status();
        let text = answer.text().await.unwrap();
        assert!(status.is_success(), "{path:?}: {status} {text}");
        serde_json::from_str(&text).unwrap_or(Value::Null)
    }
}

/// Texts alone: what the broker adds about a death is no text.
fn headers(properties: &BasicProperties) -> BTreeMap<String, String> {
    let Some(table) = properties.headers().as_ref() else { return BTreeMap::new() };
    let texts = table.inner().iter().filter(|(name, _)| !name.as_str().starts_with("x-"));
    texts
        .filter_map(|(name, value)| match value {
            AMQPValue::LongString(text) => Some((name.to_string(), text.to_string())),
            _ => None,
        })
        .collect()
}

impl Drop for Vhost {
    fn drop(&mut self) {
        delete(&self.api, vec!["vhosts".into(), self.name.clone()]);
    }
}

/// Takes something away by the management API, from a destructor.
fn delete(api: &Url, path: Vec<String>) {
    let (mut url, http) = (api.clone(), http());
    finish_blocking(async move {
        let (user, password) = (url.username().to_owned(), url.password().map(str::to_owned));
        if url.set_username("").is_ok() && url.set_password(None).is_ok() {
            if let Ok(mut segments) = url.path_segments_mut() {
                segments.pop_if_empty().push("api").extend(&path);
            }
            drop(http.delete(url).basic_auth(user, password).send().await);
        }
    });
}
