//! The least HTTP client that these tests need: one request per connection, so that dropping it is hanging up.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
};

use serde_json::Value;

/// A reply, read to its end.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The body, which must be JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// The JSON of each `data:` line, checking the framing; `[DONE]` becomes a string.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.header("content-type"), Some("text/event-stream"), "{self:?}");
        assert!(self.body.ends_with("\n\n"), "{self:?}");
        let lines = self.body.trim_end_matches("\n\n").split("\n\n").filter(|line| *line != ":");
        lines
            .map(|line| match line.strip_prefix("data: ") {
                Some("[DONE]") => Value::from("[DONE]"),
                Some(json) => serde_json::from_str(json).unwrap_or_else(|e| panic!("{e}: {line}")),
                None => panic!("no data line: {line:?}"),
            })
            .collect()
    }
}

/// A request under way.
pub struct Connection(BufReader<TcpStream>);

impl Connection {
    pub fn open(
        addr: SocketAddr,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Connection {
        let mut stream = TcpStream::connect(addr).expect("the server listens");
        let mut head = format!(
            "{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: {}\r\n",
            body.len()
        );
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        stream.write_all(head.as_bytes()).expect("the server reads");
        // A server that refuses a body need not read it.
        let _ = stream.write_all(body);
        Connection(BufReader::new(stream))
    }

    /// The next line of the reply, framing of chunks included.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("the reply goes on");
        line
    }

    /// Reads on until a line contains `text`.
    pub fn wait_for(&mut self, text: &str) {
        loop {
            let line = self.line();
            assert!(!line.is_empty(), "the reply ended without {text:?}");
            if line.contains(text) {
                return;
            }
        }
    }

    /// The whole reply, or what is left of its body after [`Connection::wait_for`].
    pub fn rest(mut self) -> String {
        let mut bytes = Vec::new();
        self.0.read_to_end(&mut bytes).expect("the reply ends");
        String::from_utf8(bytes).expect("replies are UTF-8")
    }

    pub fn reply(self) -> Reply {
        let text = self.rest();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head: {text:?}"));
        let mut lines = head.split("\r\n");
        let status = lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|code| code.parse().ok());
        let headers: Vec<(String, String)> = lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        let chunked = headers.iter().any(|(name, value)| name == "transfer-encoding" && value == "chunked");
        let body = if chunked { unchunk(body) } else { body.to_owned() };
        Reply { status: status.unwrap_or_else(|| panic!("no status: {head:?}")), headers, body }
    }
}

fn unchunk(mut body: &str) -> String {
    let mut out = String::new();
    loop {
        let (size, rest) = body.split_once("\r\n").expect("a chunk's size");
        let size = usize::from_str_radix(size, 16).expect("a size in hex");
        if size == 0 {
            return out;
        }
        out.push_str(&rest[..size]);
        body = &rest[size + 2..];
    }
}
