//! One attempt to connect. lapin drives it on a thread of its own, which only ends when the socket does: an attempt that
//! was given up has to cut it, or a broker that accepts and never answers costs a thread and a socket each time.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Held by whoever waits for the connection. Dropped without [`Guard::release`], it cuts the socket.
#[derive(Default)]
pub(super) struct Guard {
    socket: Arc<Mutex<Socket>>,
    is_released: bool,
}

/// The socket of an attempt.
#[derive(Default)]
enum Socket {
    /// TCP is not connected yet.
    #[default]
    Awaited,
    /// A second handle of it.
    Open(TcpStream),
    /// Nobody waits any more.
    GivenUp,
}

/// The side that makes the connection.
pub(super) struct Attempt {
    timeout: Duration,
    socket: Arc<Mutex<Socket>>,
}

impl Guard {
    /// The other side of an attempt whose steps may take so long each.
    pub(super) fn attempt(&self, timeout: Duration) -> Attempt {
        Attempt { timeout, socket: Arc::clone(&self.socket) }
    }

    /// The connection is made, and its owner's.
    pub(super) fn release(mut self) {
        self.is_released = true;
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let socket = std::mem::replace(&mut *lock(&self.socket), Socket::GivenUp);
        if let (Socket::Open(socket), false) = (socket, self.is_released) {
            // It may be closed already.
            drop(socket.shutdown(Shutdown::Both));
        }
    }
}

impl Attempt {
    /// Gives up on a step that takes too long: whoever waits may be gone by then.
    pub(super) async fn step<T>(&self, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
        tokio::time::timeout(self.timeout, work).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }

    /// TCP is connected: from now on it can be cut.
    pub(super) fn connected(&self, tcp: &impl AsFd) -> io::Result<()> {
        let second = TcpStream::from(tcp.as_fd().try_clone_to_owned()?);
        let mut socket = lock(&self.socket);
        match *socket {
            Socket::GivenUp => Err(io::ErrorKind::TimedOut.into()),
            Socket::Awaited | Socket::Open(_) => {
                *socket = Socket::Open(second);
                Ok(())
            }
        }
    }
}

/// Held for a few instructions, never across a wait.
fn lock(socket: &Mutex<Socket>) -> MutexGuard<'_, Socket> {
    socket.lock().unwrap_or_else(PoisonError::into_inner)
}
