//! The client: what `cli` says to the daemon, as plain blocking calls.
//!
//! Each call is one connection. A daemon that is not there is started (`start`), unless
//! `DELTABOX_NO_AUTOSTART=1`. Inside is a current-thread runtime; nothing async shows.

mod error;
mod input;
mod output;
mod session;
mod signals;
mod start;
mod terminal;

use std::io::{self, Write};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::HeaderValue;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

pub use error::ClientError;
pub use output::{Captured, MAX_CAPTURE, OutputTo};
pub use session::{Ended, Local};
pub use signals::SignalHold;
pub use terminal::{is_terminal, terminal_size};

use super::types::{ErrorBody, ErrorDetail, PingReport};
use super::{API, Place, STORE_HEADER};

/// A way to the daemon.
#[derive(Debug)]
pub struct Client {
    place: Place,
    autostart: bool,
    /// `Some` until dropped.
    runtime: Option<tokio::runtime::Runtime>,
}

impl Client {
    /// A client for this place. Connects to nothing yet.
    ///
    /// # Errors
    /// [`ClientError::Local`] when the system gives no event queue.
    pub fn new(place: Place) -> Result<Self, ClientError> {
        let autostart = std::env::var_os("DELTABOX_NO_AUTOSTART").is_none_or(|text| text.is_empty() || text == "0");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| ClientError::Local { op: "start runtime", source })?;
        Ok(Self { place, autostart, runtime: Some(runtime) })
    }

    /// One request and its JSON answer; an answer without a body reads as `()`.
    ///
    /// # Errors
    /// [`ClientError`], with the daemon's own words when it refused.
    pub fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, ClientError> {
        let body = body.map(encode).transpose()?;
        self.block_on(async {
            let result = self.ask(method, path, body).await;
            self.explain(result).await
        })
    }

    /// [`Self::call`] with GET.
    ///
    /// # Errors
    /// As of [`Self::call`].
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::GET, path, None::<&()>)
    }

    /// [`Self::call`] with POST.
    ///
    /// # Errors
    /// As of [`Self::call`].
    pub fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        self.call(Method::POST, path, Some(body))
    }

    /// [`Self::call`] with DELETE.
    ///
    /// # Errors
    /// As of [`Self::call`].
    pub fn delete(&self, path: &str) -> Result<(), ClientError> {
        self.call(Method::DELETE, path, None::<&()>)
    }

    /// Copies an answer of any length to `out` as it comes, in constant memory.
    ///
    /// # Errors
    /// As of [`Self::call`]; [`ClientError::Local`] when `out` fails.
    pub fn copy(&self, path: &str, out: &mut impl Write) -> Result<(), ClientError> {
        self.block_on(async {
            let result = async {
                let mut response = success(self.request(Method::GET, path, None, false).await?).await?;
                while let Some(frame) = response.frame().await {
                    let frame = frame.map_err(|source| self.lost(source))?;
                    if let Some(bytes) = frame.data_ref() {
                        out.write_all(bytes)
                            .and_then(|()| out.flush())
                            .map_err(|source| ClientError::Local { op: "write output", source })?;
                    }
                }
                Ok(())
            }
            .await;
            self.explain(result).await
        })
    }

    fn block_on<F: Future>(&self, future: F) -> F::Output {
        match &self.runtime {
            Some(runtime) => runtime.block_on(future),
            None => unreachable!("the runtime is there until drop"),
        }
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> Result<T, ClientError> {
        let response = success(self.request(method, path, body, false).await?).await?;
        let bytes = response.into_body().collect().await.map_err(|source| self.lost(source))?.to_bytes();
        let bytes: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
        serde_json::from_slice(bytes).map_err(|error| ClientError::Nonsense { what: error.to_string() })
    }

    /// Sends one request on a connection of its own, to a daemon that is started if need be.
    async fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
        upgrade: bool,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream = start::connect(&self.place, self.autostart).await?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|source| self.lost(source))?;
        tokio::spawn(connection.with_upgrades());
        let mut request = Request::new(Full::new(Bytes::from(body.unwrap_or_default())));
        *request.method_mut() = method;
        *request.uri_mut() = path
            .parse()
            .map_err(|_| ClientError::Nonsense { what: format!("`{path}` is no path of the interface") })?;
        let headers = request.headers_mut();
        headers.insert("host", HeaderValue::from_static("deltabox"));
        headers.insert("content-type", HeaderValue::from_static("application/json"));
        if let Some(store) = self.store_header() {
            headers.insert(STORE_HEADER, store);
        }
        if upgrade {
            headers.insert("connection", HeaderValue::from_static("Upgrade"));
            headers.insert("upgrade", HeaderValue::from_static(super::frame::PROTOCOL));
        }
        sender.send_request(request).await.map_err(|source| self.lost(source))
    }

    /// The store by its real path, as the daemon knows it, when the user named one.
    fn store_header(&self) -> Option<HeaderValue> {
        use std::os::unix::ffi::OsStrExt;
        let store = self.place.store_given.then(|| {
            // A store that does not exist yet is not the daemon's; its literal path says so.
            self.place.store.canonicalize().unwrap_or_else(|_| self.place.store.clone())
        })?;
        HeaderValue::from_bytes(store.as_os_str().as_bytes()).ok()
    }

    fn lost(&self, source: hyper::Error) -> ClientError {
        ClientError::Lost { socket: self.place.socket.clone(), source: io::Error::other(source) }
    }

    /// An answer that makes no sense may come from another version: asked only then, because it costs a call.
    async fn explain<T>(&self, result: Result<T, ClientError>) -> Result<T, ClientError> {
        let suspicious = match &result {
            Err(ClientError::Nonsense { .. }) => true,
            Err(ClientError::Answer { error, .. }) => {
                matches!(error.code.as_str(), "no_route" | "no_method" | "bad_json")
            }
            _ => false,
        };
        if suspicious
            && let Ok(ping) = Box::pin(self.ask::<PingReport>(Method::GET, "/v1/ping", None)).await
            && (ping.api != API || ping.version != env!("CARGO_PKG_VERSION"))
        {
            return Err(ClientError::OtherVersion { pid: ping.pid, version: ping.version, api: ping.api });
        }
        result
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // A thread that is stuck in a write or a start must not hold up the end of the program.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn encode(body: &impl Serialize) -> Result<Vec<u8>, ClientError> {
    serde_json::to_vec(body).map_err(|error| ClientError::Nonsense { what: error.to_string() })
}

/// The response if it is a success, else what the daemon says is wrong.
async fn success(response: Response<Incoming>) -> Result<Response<Incoming>, ClientError> {
    let status = response.status();
    if status.is_success() || status == StatusCode::SWITCHING_PROTOCOLS {
        return Ok(response);
    }
    // An error whose body cannot be read is still an error with a status.
    let body = response.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let error = match serde_json::from_slice::<ErrorBody>(&body) {
        Ok(body) => body.error,
        Err(_) => ErrorDetail {
            code: "http".to_owned(),
            message: format!("the daemon answered {status} without a reason"),
            hint: "is something else listening on this socket?".to_owned(),
        },
    };
    Err(ClientError::Answer { status: status.as_u16(), error })
}

/// A stream that is this socket, upgraded, and what was read of it already.
async fn upgraded(response: Response<Incoming>) -> Result<(UnixStream, Bytes), ClientError> {
    let nonsense = |what: String| ClientError::Nonsense { what };
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(nonsense(format!("{} instead of an upgrade", response.status())));
    }
    let upgraded = hyper::upgrade::on(response).await.map_err(|error| nonsense(error.to_string()))?;
    let parts = upgraded
        .downcast::<TokioIo<UnixStream>>()
        .map_err(|_| nonsense("the upgraded connection is not ours".to_owned()))?;
    Ok((parts.io.into_inner(), parts.read_buf))
}
