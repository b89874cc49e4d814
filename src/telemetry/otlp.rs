//! Traces to a collector, by OTLP over HTTP. Where to is said by OpenTelemetry's own variables
//! (`OTEL_EXPORTER_OTLP_ENDPOINT`, ...); without one nothing is exported.
//!
//! Spans hold ids and times. They leave by the one HTTP client and the one TLS stack that everything else uses.

use crate::tls::client_config;
use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{SpanExporter, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracerProvider, Tracer};
use std::collections::HashMap;
use std::pin::Pin;
use std::time::Duration;
use tokio::runtime::Handle;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// Variables of which one says where traces go.
const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];
/// For one batch of spans.
const TIMEOUT: Duration = Duration::from_secs(10);
/// For the last ones, when the process ends.
const LAST: Duration = Duration::from_secs(2);

/// The way of spans to the collector.
#[derive(Debug)]
pub(super) struct Exporting(SdkTracerProvider);

impl Exporting {
    /// Connects nowhere yet. `None`: no variable says where to.
    pub(super) fn start() -> Result<Option<Self>, Box<dyn std::error::Error + Send + Sync>> {
        if ENDPOINTS.iter().all(|name| std::env::var_os(name).is_none_or(|value| value.is_empty())) {
            return Ok(None);
        }
        let client =
            reqwest::Client::builder().tls_backend_preconfigured(client_config(None)?).timeout(TIMEOUT).build()?;
        let client = Client { client, runtime: Handle::current() };
        let exporter = SpanExporter::builder().with_http().with_http_client(client).build()?;
        let resource = Resource::builder().with_service_name("keyferry").build();
        Ok(Some(Self(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build())))
    }

    pub(super) fn tracer(&self) -> Tracer {
        self.0.tracer("keyferry")
    }

    /// Sends what is left, within a bound.
    pub(super) async fn end(self) {
        let ending = tokio::task::spawn_blocking(move || self.0.shutdown_with_timeout(LAST));
        if let Ok(Err(error)) = ending.await {
            tracing::warn!(error.message = %error, "the last traces were not exported");
        }
    }
}

/// A span becomes a part of the trace that a message brought.
pub(super) fn follow(span: &Span, traceparent: &str) {
    let carrier = HashMap::from([("traceparent".to_owned(), traceparent.to_owned())]);
    let parent = TraceContextPropagator::new().extract(&carrier);
    if let Err(error) = span.set_parent(parent) {
        tracing::debug!(error.message = %error, "a span could not be made part of a trace");
    }
}

/// The exporter works on a thread of its own, which has no runtime.
#[derive(Debug)]
struct Client {
    client: reqwest::Client,
    runtime: Handle,
}

impl HttpClient for Client {
    fn send_bytes<'client, 'sending>(
        &'client self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'sending>>
    where
        'client: 'sending,
        Self: 'sending,
    {
        let client = self.client.clone();
        let sending = self.runtime.spawn(async move {
            let request = request.try_into()?;
            let answer = client.execute(request).await.map_err(reqwest::Error::without_url)?;
            let status = answer.status();
            if !status.is_success() {
                tracing::warn!(http.status = status.as_u16(), "the collector does not take traces");
            }
            Ok(Response::builder().status(status).body(answer.bytes().await.map_err(reqwest::Error::without_url)?)?)
        });
        Box::pin(async move {
            let answer: Result<_, HttpError> = sending.await?;
            answer.inspect_err(|error| tracing::warn!(error.message = %error, "traces do not reach the collector"))
        })
    }
}
