//! Bytes to and from a server, with waits that end.
//!
//! Guarantees: a wait ends when the server is silent for longer than is allowed, and within
//! `WAIT_MS` of a wish to stop.
//! Does not know: what the bytes mean, how the socket was connected.

use std::fmt::Debug;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendFlags};

use crate::device::Stop;
use crate::error::{Error, Result};

/// How often a wait looks whether it is to stop.
const WAIT_MS: u64 = 100;

/// Two streams of bytes.
pub trait Wire: Send + Sync + Debug {
    /// Some bytes, 0 at the end; with `whole` rather all that there is place for. The server may be
    /// silent for so long.
    fn receive(&self, place: &mut [u8], whole: bool, silence_ms: u64) -> Result<usize>;

    /// All of the bytes.
    fn send(&self, bytes: &[u8]) -> Result<()>;

    /// Ends every wait, for good.
    fn interrupt(&self);
}

/// A connected stream socket.
#[derive(Debug)]
pub struct SocketWire {
    socket: OwnedFd,
    stop: Stop,
}

impl SocketWire {
    /// The socket is used by nobody else from now on. `stop` ends every wait.
    pub fn new(socket: OwnedFd, stop: Stop) -> Result<Self> {
        let failed = |error: Errno| Error::device("prepare the NBD socket", &error.into());
        rustix::io::ioctl_fionbio(&socket, false).map_err(failed)?;
        for direction in [Timeout::Recv, Timeout::Send] {
            let wait = Some(Duration::from_millis(WAIT_MS));
            set_socket_timeout(&socket, direction, wait).map_err(failed)?;
        }
        Ok(Self { socket, stop })
    }
}

/// What a person can do about a connection that is gone.
pub(super) fn lost(words: &str) -> Error {
    Error::link(format!(
        "the connection to the NBD server was lost: {words}; run it again to go on"
    ))
}

impl Wire for SocketWire {
    fn receive(&self, place: &mut [u8], whole: bool, silence_ms: u64) -> Result<usize> {
        let flags = if whole { RecvFlags::WAITALL } else { RecvFlags::empty() };
        let mut silent_ms = 0;
        loop {
            self.stop.check()?;
            match rustix::net::recv(&self.socket, &mut *place, flags) {
                Ok((count, _)) => return Ok(count),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    silent_ms += WAIT_MS;
                    if silent_ms >= silence_ms {
                        return Err(lost(&format!("it is silent for {} s", silence_ms / 1000)));
                    }
                }
                Err(error) => return Err(lost(&error.to_string())),
            }
        }
    }

    fn send(&self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            self.stop.check()?;
            match rustix::net::send(&self.socket, bytes, SendFlags::NOSIGNAL) {
                Ok(count) => bytes = &bytes[count..],
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => return Err(lost(&error.to_string())),
            }
        }
        Ok(())
    }

    fn interrupt(&self) {
        self.stop.now();
    }
}
