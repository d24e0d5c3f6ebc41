//! Connections: taken up to a limit, closed when nothing comes, and brought to an end when the server shuts down.

use std::{
    io::{self, ErrorKind},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream, lookup_host},
    sync::{Semaphore, watch},
    time,
};

use super::guard::Access;

/// Connections that may wait to be taken. Who finds no place there tries again after a second, and the usual 128 are few.
const WAITING: u32 = 4096;

/// What those get who come when there are too many.
const FULL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: 111\r\nretry-after: 1\r\nconnection: close\r\n\r\n\
{\"error\":{\"message\":\"the server has too many connections\",\"type\":\"unavailable_error\",\"param\":null,\"code\":null}}";

/// A listener at the first of the host's addresses that can be had.
pub async fn bind(host: &str, port: u16) -> io::Result<TcpListener> {
    let mut result = Err(io::Error::new(ErrorKind::InvalidInput, "the host has no address"));
    for address in lookup_host((host, port)).await? {
        result = bind_to(address);
        if result.is_ok() {
            break;
        }
    }
    result
}

fn bind_to(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // A server that starts again need not wait for its last one's connections.
    #[cfg(unix)]
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(WAITING)
}

/// Answers on `listener` until `shutdown` is done; then takes no more connections and returns when the last one has ended.
pub(super) async fn listen(listener: TcpListener, router: Router, access: &Access, shutdown: impl Future<Output = ()>) {
    let places = Arc::new(Semaphore::new(access.connections));
    let (closing, closed) = watch::channel(());
    tokio::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            () = &mut shutdown => break,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            // One connection's trouble is not ours; what we lack, files most likely, others will give back.
            Err(error) if is_of_the_connection(&error) => continue,
            Err(error) => {
                tracing::error!("cannot take a connection: {error}");
                time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        match places.clone().try_acquire_owned() {
            Ok(place) => {
                let (service, closed, patience) = (router.clone(), closed.clone(), access.read_timeout);
                tokio::spawn(async move {
                    converse(stream, service, closed, patience).await;
                    drop(place);
                });
            }
            Err(_) => {
                tokio::spawn(time::timeout(access.read_timeout, turn_away(stream)));
            }
        }
    }
    drop((listener, closed));
    let _ = closing.send(());
    closing.closed().await;
}

/// One connection, to its end. When the server closes, what has been asked on it is still answered.
async fn converse(stream: TcpStream, router: Router, mut closed: watch::Receiver<()>, patience: Duration) {
    // Pieces of text are small, and each is wanted at once.
    let _ = stream.set_nodelay(true);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(patience)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        _ = closed.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!("a connection broke: {error}");
    }
}

/// What has been asked is read, and what comes after the answer as well: a connection that is closed over it breaks before its client has read why.
async fn turn_away(mut stream: TcpStream) {
    let mut asked = [0; 4096];
    if !matches!(stream.read(&mut asked).await, Ok(1..)) || stream.write_all(FULL).await.is_err() || stream.shutdown().await.is_err() {
        return;
    }
    while matches!(stream.read(&mut asked).await, Ok(1..)) {}
}

fn is_of_the_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn many_connections_wait_to_be_taken() {
        let listener = bind("127.0.0.1", 0).await.unwrap();
        let start = time::Instant::now();
        let mut waiting = Vec::new();
        for _ in 0..300 {
            waiting.push(TcpStream::connect(listener.local_addr().unwrap()).await.unwrap());
        }
        assert!(start.elapsed() < Duration::from_millis(900), "someone had to try again");
        assert_eq!(bind("127.0.0.1", listener.local_addr().unwrap().port()).await.unwrap_err().kind(), ErrorKind::AddrInUse);
    }

    #[test]
    fn the_refusal_has_the_length_that_it_says() {
        let text = std::str::from_utf8(FULL).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{}", body.len());
    }
}
