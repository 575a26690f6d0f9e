//! Servers in several languages that forget to close some connections after they have read their end, and a client that does so. They are
//! built as their tool chain builds them, with debug symbols.

use std::path::PathBuf;
use std::process::{Child, Stdio};

use anyhow::{Context as _, Result, ensure};

use super::BuildDir;
use crate::host::Host;
use crate::program::{is_found, path_of};

/// The program of Debian's package redis-tools that is the server, too, under another name.
const REDIS: &str = "redis-check-rdb";

/// A program of `netns-harness/leaks`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leaky {
    C,
    CWithFramePointers,
    /// Without any symbols.
    CStripped,
    /// With a C library that has no unwind information, as in containers of Alpine.
    CWithMusl,
    Cpp,
    Rust,
    Go,
    Java,
    /// Its methods are compiled at once, with frame pointers.
    JavaWithFramePointers,
    Python,
    Node,
    /// The client, in C.
    Connect,
    /// Debian's Redis, with a module in C that leaks connections which it has opened. Its port is that for commands.
    Redis,
    /// A client in C that makes the server of [`Leaky::C`] leak as fast as it can.
    Storm,
}

/// A running [`Leaky`]. Killed when dropped.
#[derive(Debug)]
pub struct Leaker {
    child: Child,
    build_dir: BuildDir,
    program: Leaky,
}

impl Leaky {
    /// A program that is needed to build or run it, but not installed.
    #[must_use]
    pub fn missing_tool(self) -> Option<&'static str> {
        let tools: &[&str] = match self {
            Self::C | Self::CWithFramePointers | Self::CStripped | Self::Connect | Self::Storm => {
                &["cc"]
            }
            Self::CWithMusl => &["musl-gcc"],
            Self::Redis => &["cc", REDIS],
            Self::Cpp => &["c++"],
            Self::Rust => &["rustc"],
            Self::Go => &["go"],
            Self::Java | Self::JavaWithFramePointers => &["java", "javac", "jcmd"],
            Self::Python => &["python3"],
            Self::Node => &["node"],
        };
        tools.iter().copied().find(|tool| !is_found(tool))
    }

    /// The name of its source file, and the text.
    #[must_use]
    pub fn source(self) -> (&'static str, &'static str) {
        match self {
            Self::C | Self::CWithFramePointers | Self::CStripped | Self::CWithMusl => {
                ("leak.c", include_str!("../../leaks/leak.c"))
            }
            Self::Cpp => ("leak.cpp", include_str!("../../leaks/leak.cpp")),
            Self::Rust => ("leak.rs", include_str!("../../leaks/leak.rs")),
            Self::Go => ("leak.go", include_str!("../../leaks/leak.go")),
            Self::Java | Self::JavaWithFramePointers => {
                ("Leak.java", include_str!("../../leaks/Leak.java"))
            }
            Self::Python => ("leak.py", include_str!("../../leaks/leak.py")),
            Self::Node => ("leak.js", include_str!("../../leaks/leak.js")),
            Self::Connect => ("connect.c", include_str!("../../leaks/connect.c")),
            Self::Storm => ("storm.c", include_str!("../../leaks/storm.c")),
            Self::Redis => ("redis_module.c", include_str!("../../leaks/redis_module.c")),
        }
    }

    /// The number of the line with this comment.
    #[must_use]
    pub fn line_of(self, comment: &str) -> Option<usize> {
        let (_, text) = self.source();
        let mut lines = text.lines();
        let at = lines.position(|line| line.ends_with(&format!("// {comment}")))?;
        Some(at + 1)
    }

    /// Builds it. Returns the words that run it.
    fn build(self, build_dir: &BuildDir) -> Result<Vec<String>> {
        let compiler = match self {
            Self::C => "cc -O2 -g -o leak leak.c",
            Self::CWithFramePointers => "cc -O2 -g -fno-omit-frame-pointer -o leak leak.c",
            Self::CStripped => "cc -O2 -s -o leak leak.c",
            Self::CWithMusl => "musl-gcc -static -O2 -g -o leak leak.c",
            Self::Cpp => "c++ -O2 -g -o leak leak.cpp",
            Self::Rust => "rustc -O -g -o leak leak.rs",
            Self::Go => "go build -o leak leak.go",
            Self::Java | Self::JavaWithFramePointers => "javac Leak.java",
            Self::Python | Self::Node => "true",
            Self::Connect => "cc -O2 -g -o leak connect.c",
            Self::Storm => "cc -O2 -o leak storm.c",
            Self::Redis => "cc -O2 -g -shared -fPIC -o module.so redis_module.c",
        };
        let (name, text) = self.source();
        let compiler: Vec<&str> = compiler.split(' ').collect();
        build_dir.build(name, text, &compiler)?;
        let path = |name: &str| build_dir.path(name).display().to_string();
        let java = |options: &[&str]| {
            let options = ["java", "-Xmx64m", "-XX:+UseSerialGC"]
                .iter()
                .chain(options);
            let words = options.map(|word| (*word).to_owned());
            words
                .chain(["-cp".to_owned(), path(""), "Leak".to_owned()])
                .collect()
        };
        Ok(match self {
            Self::Java => java(&[]),
            Self::JavaWithFramePointers => java(&[
                "-XX:+PreserveFramePointer",
                "-Xcomp",
                "-XX:CompileCommand=quiet",
                "-XX:CompileCommand=compileonly,Leak::*",
                "-XX:CompileCommand=dontinline,Leak::*",
            ]),
            Self::Python => vec!["python3".into(), path(name)],
            Self::Node => vec!["node".into(), path(name)],
            Self::Redis => {
                // The package with the server would start it, and is only this link.
                let server = path_of(REDIS).with_context(|| format!("there is no {REDIS}"))?;
                std::os::unix::fs::symlink(server, path("redis-server"))?;
                let words = ["redis-server", "", "module.so"].map(path);
                let [program, directory, module] = words;
                let quiet = ["--save", "", "--dir", &directory, "--loadmodule", &module];
                let options = quiet.into_iter().chain(["--port"]);
                std::iter::once(program)
                    .chain(options.map(str::to_owned))
                    .collect()
            }
            _ => vec![path("leak")],
        })
    }
}

impl Leaker {
    /// Starts it with these arguments, the first of which is a port on 127.0.0.1.
    ///
    /// # Errors
    /// It cannot be built or started.
    pub fn start(host: &Host, program: Leaky, arguments: &[&str]) -> Result<Self> {
        Self::start_through(host, &[], program, arguments)
    }

    /// As [`Self::start`], through a wrapper such as `env` that executes its arguments.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_through(
        host: &Host,
        wrapper: &[&str],
        program: Leaky,
        arguments: &[&str],
    ) -> Result<Self> {
        let build_dir = BuildDir::new()?;
        let words = program.build(&build_dir)?;
        let words: Vec<&str> = wrapper
            .iter()
            .copied()
            .chain(words.iter().map(String::as_str))
            .chain(arguments.iter().copied())
            .collect();
        let child = host
            .command(words[0])
            .args(&words[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("start {program:?}"))?;
        Ok(Self {
            child,
            build_dir,
            program,
        })
    }

    /// Pid of the process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended by itself.
    ///
    /// # Errors
    /// It has failed.
    pub fn has_ended(&mut self) -> Result<bool> {
        let ended = self.child.try_wait()?;
        ensure!(ended.is_none_or(|it| it.success()), "{ended:?}");
        Ok(ended.is_some())
    }

    /// The file that it runs. It is the interpreter's source for languages with an interpreter.
    #[must_use]
    pub fn file(&self) -> PathBuf {
        match self.program {
            Leaky::Java | Leaky::JavaWithFramePointers | Leaky::Python | Leaky::Node => {
                self.build_dir.path(self.program.source().0)
            }
            Leaky::Redis => self.build_dir.path("redis-server"),
            _ => self.build_dir.path("leak"),
        }
    }
}

impl Drop for Leaker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
