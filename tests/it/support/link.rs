//! A way to a server that can be cut, and one that swallows everything without a word.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use url::Url;

/// What becomes of connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// They go through.
    Open,
    /// They are cut, and so is each that comes.
    Closed,
    /// They stand, and nothing comes through. They never recover: what was on its way is lost.
    Frozen,
}

/// The link. Ends with the runtime of its test.
pub struct Link {
    port: u16,
    state: watch::Sender<State>,
    made: Arc<AtomicUsize>,
}

impl Link {
    /// An open one to the server of a URL.
    pub async fn to(url: &str) -> Self {
        let target: Url = url.parse().unwrap();
        let target = (target.host_str().unwrap().to_owned(), target.port().unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (state, watched) = watch::channel(State::Open);
        let made = Arc::<AtomicUsize>::default();
        let counted = Arc::clone(&made);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(pass(near, target.clone(), watched.clone()));
            }
        });
        Self { port, state, made }
    }

    /// The same URL by way of this link.
    pub fn detour(&self, url: &str) -> String {
        let mut url: Url = url.parse().unwrap();
        url.set_port(Some(self.port)).unwrap();
        url.into()
    }

    /// Cuts every connection, and lets none through.
    pub fn close(&self) {
        self.state.send_replace(State::Closed);
    }

    /// From now on nothing comes through, and nobody is told.
    pub fn freeze(&self) {
        self.state.send_replace(State::Frozen);
    }

    /// Lets new connections through. Those that were frozen stay so.
    pub fn open(&self) {
        self.state.send_replace(State::Open);
    }

    /// Connections that were made so far.
    pub fn made(&self) -> usize {
        self.made.load(Ordering::Relaxed)
    }
}

async fn pass(mut near: TcpStream, target: (String, u16), mut state: watch::Receiver<State>) {
    let passing = async {
        if *state.borrow() == State::Open {
            let mut far = TcpStream::connect(target).await.unwrap();
            // Either side may go as it likes.
            drop(tokio::io::copy_bidirectional(&mut near, &mut far).await);
        } else {
            std::future::pending::<()>().await;
        }
    };
    let mut troubled = state.clone();
    let end = tokio::select! {
        () = passing => return,
        end = troubled.wait_for(|state| *state != State::Open) => end.map(|state| *state),
    };
    if matches!(end, Ok(State::Frozen)) {
        // Both sockets stay open, and nobody reads them.
        drop(state.wait_for(|state| *state == State::Closed).await);
    }
}
