//! The socket that clients connect to.

use std::io;
use std::net::SocketAddr;

use tokio::net::{TcpListener, TcpSocket};

/// Connections that may wait to be accepted; Linux takes no more than `net.core.somaxconn`. One that
/// finds no room is made at its client's second try, a second later.
const BACKLOG: u32 = 8192;

/// Takes an address. Nobody can connect before [`listen`].
///
/// # Errors
/// If the address is not there, or taken.
pub fn bind(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // A server that was just restarted gets its port back; elsewhere this would share the port.
    #[cfg(unix)]
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

/// Lets clients connect, as many at once as the system allows. Within a Tokio runtime.
///
/// # Errors
/// If the system refuses.
pub fn listen(socket: TcpSocket) -> io::Result<TcpListener> {
    socket.listen(BACKLOG)
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_crowd_connects_before_anybody_is_accepted() {
        let listener = listen(bind("127.0.0.1:0".parse().unwrap()).unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let allowed = std::fs::read_to_string("/proc/sys/net/core/somaxconn");
        let allowed = allowed.map_or(128, |allowed| allowed.trim().parse().unwrap());
        // Who finds no room is let in a second later at the earliest.
        let patience = Duration::from_millis(900);
        let crowd: Result<Vec<TcpStream>, io::Error> =
            (0..allowed.min(512)).map(|_| TcpStream::connect_timeout(&address, patience)).collect();
        crowd.unwrap();
    }
}
