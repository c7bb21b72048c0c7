//! The API without a network: the body of a request in, the status and body of its answer out.

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::http::{Method, Request};
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use minisgl_frontend::Frontend;

use crate::app::App;
use crate::options::ServerOptions;
use crate::router::router;

/// Answers requests of this process exactly as the server answers those of its clients.
#[derive(Clone)]
pub struct InProcess {
    service: TowerToHyperService<Router>,
}

impl InProcess {
    /// Needs no listener; whoever asks is trusted with any key and any length that `options` allow.
    pub fn new(frontend: Frontend, options: ServerOptions) -> Self {
        Self { service: TowerToHyperService::new(router(App::new(frontend, options))) }
    }

    /// Posts JSON to `path`. The answer to a request that asks for a stream is all of its events.
    pub async fn post(&self, path: &str, body: String) -> (u16, Bytes) {
        let request = Request::builder().method(Method::POST).uri(path).body(Body::from(body));
        let request = match request {
            Ok(request) => request,
            Err(error) => return (400, Bytes::from(error.to_string())),
        };
        let Ok(response) = self.service.call(request).await;
        let status = response.status().as_u16();
        match to_bytes(response.into_body(), usize::MAX).await {
            Ok(body) => (status, body),
            Err(error) => (500, Bytes::from(error.to_string())),
        }
    }
}
