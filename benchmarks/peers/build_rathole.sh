#!/bin/bash
# Build rathole without crates.io: from clones of three repositories, and the Rust libraries of Debian 12.
#
#     build_rathole.sh FOLDER
#
# FOLDER holds clones of rathole, tungstenite-rs and tokio-tungstenite, with their tags or history. The program is
# FOLDER/rathole-build/target/release/rathole: put it on PATH, or name it in PROGRAMS, for `make bench`. The packages:
#
#     apt-get install librust-{anyhow,async-trait,atty,backoff,base64,bincode,byteorder,bytes,data-encoding,fdlimit}-dev \
#         librust-{futures,hex,http,httparse,lazy-static,rand,serde,serde-derive,sha1,sha2,socket2,thiserror,tokio,tokio-native-tls}-dev \
#         librust-{tokio-util,toml,tracing,tracing-subscriber,url,utf-8}-dev
#
# What carries visitors is rathole's own code. What Debian has no library for is left out: its command line (this one
# takes --server and --client alone), outgoing proxies, Noise and reloading. So are the versions of its lock file.
set -eu
folder=$(cd "$1" && pwd)
build=$folder/rathole-build
rm -rf "$build/src" "$build/tungstenite" "$build/tokio-tungstenite"
mkdir -p "$build/.cargo"
copy() { mkdir -p "$build/$2" && git -C "$folder/$1" archive "$3" | tar -x -C "$build/$2"; }
release() { git -C "$folder/$1" log --all --format=%H -G "^version = \"$2\"" -- Cargo.toml | tail -1; }
copy rathole . HEAD
copy tungstenite-rs tungstenite "$(release tungstenite-rs 0.20.1)"
copy tokio-tungstenite tokio-tungstenite "$(release tokio-tungstenite 0.20.1)"
cd "$build"
rm -f build.rs Cargo.lock rust-toolchain*

cat > .cargo/config.toml <<'TOML'
[source.crates-io]
replace-with = "debian"
[source.debian]
directory = "/usr/share/cargo/registry"
TOML

cat > Cargo.toml <<'TOML'
[package]
name = "rathole"
version = "0.5.0"
edition = "2021"

[features]
default = ["server", "client", "native-tls", "websocket-native-tls"]
server = []
client = []
native-tls = []
websocket-native-tls = []

[profile.release]
panic = "abort"
lto = true
codegen-units = 1

[dependencies]
anyhow = "1"
async-trait = "0.1"
atty = "0.2"
backoff = { version = "0.4", features = ["tokio"] }
base64 = "0.13"
bincode = "1"
bytes = { version = "1", features = ["serde"] }
fdlimit = "0.2"
futures-core = "0.3"
futures-sink = "0.3"
hex = "0.4"
lazy_static = "1.4"
rand = "0.8"
serde = { version = "1", features = ["derive"] }
sha2 = "0.10"
socket2 = { version = "0.4", features = ["all"] }
tokio = { version = "1", features = ["full"] }
tokio-native-tls = "0.3"
tokio-tungstenite = { path = "tokio-tungstenite" }
tokio-util = { version = "0.7", features = ["io"] }
toml = "0.5"
tracing = "0.1"
tracing-subscriber = { version = "0.3", features = ["env-filter"] }
url = { version = "2", features = ["serde"] }

[lints.rust]
warnings = "allow"

[patch.crates-io]
tungstenite = { path = "tungstenite" }

[workspace]
exclude = ["tungstenite", "tokio-tungstenite"]
TOML

cat > src/cli.rs <<'RUST'
use std::path::PathBuf;

#[derive(Clone, Copy, Debug)]
pub enum KeypairType {
    X25519,
    X448,
}

#[derive(Clone, Debug, Default)]
pub struct Cli {
    pub config_path: Option<PathBuf>,
    pub server: bool,
    pub client: bool,
    pub genkey: Option<Option<KeypairType>>,
}

impl Cli {
    pub fn parse() -> Self {
        let mut cli = Cli::default();
        for argument in std::env::args().skip(1) {
            match argument.as_str() {
                "--server" => cli.server = true,
                "--client" => cli.client = true,
                path => cli.config_path = Some(path.into()),
            }
        }
        cli
    }
}
RUST
sed -i '/^use clap::Parser;/d' src/main.rs

# A connection through a proxy is refused.
python3 - <<'PYTHON'
import re
from pathlib import Path

file = Path("src/helper.rs")
text = re.sub(r"use async_http_proxy.*\n", "", file.read_text())
start = text.index("    if let Some(url) = proxy {")
end = text.index("        Ok(match addr.socket_addr")
file.write_text(text[:start] + '    if proxy.is_some() {\n        anyhow::bail!("built without proxies")\n    } else {\n' + text[end:])
PYTHON

# Their examples, tests and other kinds of TLS ask for more than Debian has.
python3 - <<'PYTHON'
import re
from pathlib import Path

for name in ("tungstenite", "tokio-tungstenite"):
    file = Path(name, "Cargo.toml")
    sections = re.split(r"(?m)^(?=\[)", file.read_text())
    unwanted = re.compile(r"\[(dev-dependencies|\[|features|dependencies\.(native-tls|rustls|tokio-native|tokio-rustls|webpki))")
    kept = "".join(section for section in sections if not unwanted.match(section))
    kept = re.sub(r'(?s)(?<=\[dependencies).*', lambda rest: re.sub(r'"(\d+\.\d+)\.\d+"', r'"\1"', rest[0]), kept)
    features = {"tungstenite": 'handshake = ["data-encoding", "http", "httparse", "sha1", "url"]', "tokio-tungstenite": 'handshake = ["tungstenite/handshake"]\nstream = []'}
    file.write_text(f'{kept}\n[features]\ndefault = ["handshake"]\n{features[name]}\n')
PYTHON

cargo build --release --offline
echo "built $build/target/release/rathole"
