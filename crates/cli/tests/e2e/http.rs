//! As much of an HTTP/1.1 client as the tests need: one request per connection, and no patience with a server that
//! ends a reply in the middle.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::TcpStream,
    time::Duration,
};

use serde_json::Value;

/// No step of these tests takes as long: a server that is silent for this long hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// A reply whose head has been read.
pub struct Reply {
    pub status: u16,
    headers: Vec<(String, String)>,
    body: Body,
}

/// The body as it comes in.
enum Body {
    /// `Content-Length`: bytes left.
    Sized(BufReader<TcpStream>, u64),
    /// `Transfer-Encoding: chunked`: bytes left of the chunk, none after the last one.
    Chunked(BufReader<TcpStream>, Option<u64>),
}

/// One event of a stream.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    Data(Value),
    /// `data: [DONE]`
    Done,
}

/// Connects and sends a request, without waiting for anything.
pub fn send(
    address: &str,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n");
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    if !body.is_empty() {
        head += &format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
    }
    stream.write_all(format!("{head}\r\n{body}").as_bytes())?;
    Ok(stream)
}

impl Reply {
    /// Reads the head of a reply.
    pub fn read(stream: TcpStream) -> io::Result<Reply> {
        let mut reader = BufReader::new(stream);
        let status_line = line(&mut reader)?;
        let status = status_line.split(' ').nth(1).and_then(|s| s.parse().ok());
        let status = status.ok_or_else(|| broken(format!("no status in {status_line:?}")))?;
        let mut headers = Vec::new();
        loop {
            let line = line(&mut reader)?;
            if line.is_empty() {
                break;
            }
            let (name, value) = line.split_once(':').ok_or_else(|| broken(format!("no header: {line:?}")))?;
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        let of = |name: &str| headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str());
        let body = match of("transfer-encoding") {
            Some("chunked") => Body::Chunked(reader, Some(0)),
            _ => Body::Sized(reader, of("content-length").and_then(|n| n.parse().ok()).unwrap_or(0)),
        };
        Ok(Reply { status, headers, body })
    }

    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// The rest of the body; an error if the server did not send all that it had announced.
    pub fn text(&mut self) -> io::Result<String> {
        let mut bytes = Vec::new();
        while let Some(part) = self.body.part()? {
            bytes.extend(part);
        }
        String::from_utf8(bytes).map_err(|e| broken(e.to_string()))
    }

    /// The body as JSON.
    pub fn json(&mut self) -> io::Result<Value> {
        let text = self.text()?;
        serde_json::from_str(&text).map_err(|e| broken(format!("{e} in {text:?}")))
    }

    /// The body as server-sent events.
    pub fn events(self) -> Events {
        assert_eq!(self.header("content-type"), Some("text/event-stream"));
        Events { body: self.body, text: String::new(), partial: Vec::new() }
    }
}

/// The events of a stream, as they come. Ends where the server ends it; a connection that breaks is an error.
pub struct Events {
    body: Body,
    text: String,
    partial: Vec<u8>,
}

impl Iterator for Events {
    type Item = io::Result<Event>;

    fn next(&mut self) -> Option<io::Result<Event>> {
        loop {
            while let Some(at) = self.text.find("\n\n") {
                let event: String = self.text.drain(..at + 2).collect();
                // A line that starts with a colon is a comment: "I am still here".
                let Some(data) = event.trim_end().strip_prefix("data: ") else { continue };
                let event = match data {
                    "[DONE]" => Ok(Event::Done),
                    json => serde_json::from_str(json)
                        .map(Event::Data)
                        .map_err(|e| broken(format!("{e} in {json:?}"))),
                };
                return Some(event);
            }
            match self.body.part() {
                Err(error) => return Some(Err(error)),
                Ok(None) if self.text.is_empty() && self.partial.is_empty() => return None,
                Ok(None) => return Some(Err(broken(format!("the stream ends with {:?}", self.text)))),
                Ok(Some(bytes)) => {
                    self.partial.extend(bytes);
                    let n = match std::str::from_utf8(&self.partial) {
                        Ok(text) => text.len(),
                        Err(error) => error.valid_up_to(),
                    };
                    let whole: Vec<u8> = self.partial.drain(..n).collect();
                    self.text.push_str(&String::from_utf8_lossy(&whole));
                }
            }
        }
    }
}

impl Body {
    /// The next bytes, as soon as there are some; none at the end.
    fn part(&mut self) -> io::Result<Option<Vec<u8>>> {
        let (reader, left) = match self {
            Body::Sized(_, 0) | Body::Chunked(_, None) => return Ok(None),
            Body::Sized(reader, left) => (reader, left),
            Body::Chunked(reader, chunk) => {
                if *chunk == Some(0) {
                    let size = line(reader)?;
                    let size =
                        u64::from_str_radix(&size, 16).map_err(|_| broken(format!("chunk size {size:?}")))?;
                    if size == 0 {
                        line(reader)?;
                        *chunk = None;
                        return Ok(None);
                    }
                    *chunk = Some(size);
                }
                let Some(left) = chunk else { return Ok(None) };
                (reader, left)
            }
        };
        let got = reader.fill_buf()?;
        if got.is_empty() {
            return Err(broken(format!("the connection ended {left} bytes early")));
        }
        let n = got.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
        let part = got[..n].to_vec();
        reader.consume(n);
        *left -= n as u64;
        if let Body::Chunked(reader, Some(0)) = self {
            line(reader)?;
        }
        Ok(Some(part))
    }
}

fn line(reader: &mut BufReader<TcpStream>) -> io::Result<String> {
    let mut line = String::new();
    // Heads and chunk sizes are short; a peer that sends no line end must not fill the memory.
    let n = reader.take(16 << 10).read_line(&mut line)?;
    if n == 0 {
        return Err(broken("the connection ended where a line was due".into()));
    }
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

fn broken(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
