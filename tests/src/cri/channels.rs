//! What `kubectl port-forward` and `kubectl exec` need: streams through the streaming server of the CRI plugin, by its WebSocket protocol.

use std::net::TcpStream;
use std::time::Duration;

use k8s_cri::v1::{ExecRequest, PortForwardRequest};
use tungstenite::client::IntoClientRequest as _;
use tungstenite::http::HeaderValue;
use tungstenite::{Message, WebSocket};

use super::{Cri, Pod, limited};
use crate::containerd::Containerd;

/// Messages begin with the number of their channel.
const PROTOCOL: &str = "v4.channel.k8s.io";
/// Longest silence of the server.
const DEADLINE: Duration = Duration::from_secs(60);

/// A connection with several channels.
pub struct Channels(WebSocket<TcpStream>);

impl Cri {
    /// Connects to a port of a pod, whose bytes are on channel 0.
    ///
    /// # Panics
    /// When the plugin or its streaming server refuses.
    pub async fn forward(&mut self, containerd: &Containerd, pod: &Pod, port: u16) -> Channels {
        let request = PortForwardRequest { pod_sandbox_id: pod.id.clone(), port: vec![port.into()] };
        let url = self.runtime.port_forward(limited(request)).await.expect("a URL").into_inner().url;
        let mut channels = Channels::open(containerd, &url);
        // Those of data and of errors name their port.
        for channel in 0..2 {
            let [low, high] = port.to_le_bytes();
            assert_eq!(channels.0.read().expect("a message").into_data(), [channel, low, high].as_slice());
        }
        channels
    }

    /// Runs a command on a terminal of a container: channel 0 is its input, 1 its output, 3 tells its end, 4 takes the terminal's size.
    ///
    /// # Panics
    /// When the plugin or its streaming server refuses.
    pub async fn exec_on_terminal(&mut self, containerd: &Containerd, container: &str, command: &[&str]) -> Channels {
        let request = ExecRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            tty: true,
            stdin: true,
            stdout: true,
            stderr: false,
        };
        let url = self.runtime.exec(limited(request)).await.expect("a URL").into_inner().url;
        Channels::open(containerd, &url)
    }
}

impl Channels {
    fn open(containerd: &Containerd, url: &str) -> Self {
        let url = url.replacen("http://", "ws://", 1);
        let mut request = url.as_str().into_client_request().expect("a URL");
        let server = request.uri().authority().expect("a host").to_string();
        request.headers_mut().insert("Sec-WebSocket-Protocol", HeaderValue::from_static(PROTOCOL));
        let stream = containerd.inside(|| TcpStream::connect(server)).expect("the streaming server listens");
        stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        let (socket, _) = tungstenite::client(request, stream).expect("an upgrade");
        Self(socket)
    }

    /// Sends bytes on a channel.
    ///
    /// # Panics
    /// When the connection is gone.
    pub fn send(&mut self, channel: u8, bytes: &[u8]) {
        let message = [&[channel], bytes].concat();
        self.0.send(Message::Binary(message.into())).expect("sent");
    }

    /// What comes on a channel until it has brought `end`, or until the end of the connection.
    ///
    /// # Panics
    /// When nothing comes for a minute.
    pub fn receive_until(&mut self, channel: u8, end: &str) -> String {
        let mut received = String::new();
        while !received.contains(end) {
            match self.0.read() {
                Ok(Message::Binary(bytes)) if bytes.first() == Some(&channel) => {
                    received.push_str(&String::from_utf8_lossy(&bytes[1..]));
                }
                Err(tungstenite::Error::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    panic!("nothing follows {received:?}")
                }
                Ok(Message::Close(_)) | Err(_) => break,
                Ok(_) => {}
            }
        }
        received
    }
}
