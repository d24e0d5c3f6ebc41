//! Connections: taken up to a limit, closed when nothing comes, and brought to an end when the server shuts down.

use std::{io, sync::Arc, time::Duration};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    time,
};

use super::guard::Access;

/// What those get who come when there are too many.
const FULL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: 111\r\nretry-after: 1\r\nconnection: close\r\n\r\n\
{\"error\":{\"message\":\"the server has too many connections\",\"type\":\"unavailable_error\",\"param\":null,\"code\":null}}";

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

    #[test]
    fn the_refusal_has_the_length_that_it_says() {
        let text = std::str::from_utf8(FULL).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{}", body.len());
    }
}
