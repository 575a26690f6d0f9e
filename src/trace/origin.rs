//! Whose code a function is: the program's own, or that of libraries that every program of its language has.

use serde::{Deserialize, Serialize};
use strum::IntoStaticStr;

/// Whose code it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
pub enum Origin {
    /// The program's.
    Own,
    /// Of the C library, or of what belongs to the language.
    Runtime,
}

/// What a process runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    Java,
    Node,
    /// The version, as far as the file name tells it.
    Python(u32, u32),
    Go,
}

/// Files of the C library, of languages, and of the programs that run programs.
const RUNTIME_FILES: &[&str] = &[
    "[vdso]",
    "ld-linux",
    "ld-musl",
    "libc-",
    "libc.",
    "libm.",
    "libpthread",
    "libgcc_s",
    "libstdc++",
    "libc++",
    "libuv",
    "libjvm",
    "libjava",
    "libjli",
    "libnet.",
    "libnio.",
    "libpython",
    "libruby",
    "libperl",
    "libnode",
    "libcoreclr",
    "libmono",
];

/// Programs that run programs: their own code is not that of the program.
const INTERPRETERS: &[&str] = &[
    "python", "node", "nodejs", "java", "ruby", "perl", "php", "php-fpm", "beam.smp", "dotnet",
    "mono",
];

/// The first part of the names of Go's standard library.
const GO_PACKAGES: &[&str] = &[
    "bufio", "bytes", "compress", "context", "crypto", "encoding", "errors", "fmt", "internal",
    "io", "iter", "log", "net", "os", "reflect", "runtime", "slices", "strings", "sync", "syscall",
    "time", "vendor",
];

/// The start of names of the standard libraries of Rust and C++, and of what runs tasks in them.
const NAMESPACES: &[&str] = &[
    "std::",
    "core::",
    "alloc::",
    "tokio::",
    "mio::",
    "async_std::",
    "async_io::",
    "smol::",
    "polling::",
    "__gnu_cxx::",
    "boost::asio::",
    "__rust_",
    "rust_begin",
];

/// Packages of Java's own.
const JAVA_PACKAGES: &[&str] = &["java", "javax", "jdk", "sun", "com.sun"];

/// Functions of a C library that is a part of the program's file.
const C_FUNCTIONS: &[&str] = &[
    "_start",
    "start_thread",
    "clone",
    "clone3",
    "main_thread",
    "read",
    "readv",
    "recv",
    "recvfrom",
    "recvmsg",
    "recvmmsg",
    "accept",
    "accept4",
    "connect",
    "syscall",
    "syscall_cp_asm",
    // Of musl.
    "sccp",
    "libc_start_main_stage2",
];

impl Origin {
    /// The stable name for programs.
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// Whose code a function is, by its name, its source file and the file that has it.
    pub fn of(
        function: Option<&str>,
        file: Option<&str>,
        module: Option<&str>,
        runtime: Option<Runtime>,
    ) -> Origin {
        let base = module.map(|module| module.rsplit('/').next().unwrap_or(module));
        let is_runtime_file = base.is_some_and(|base| {
            RUNTIME_FILES.iter().any(|start| base.starts_with(start))
                || is_interpreter(base)
                || base.contains(".cpython-")
                || module.is_some_and(is_of_system)
        });
        let is_runtime_function = function.is_some_and(|name| match runtime {
            Some(Runtime::Go) => is_of_go(name) || is_of_c(name),
            Some(Runtime::Java) if module.is_none() => is_of_java(name),
            Some(Runtime::Python(..)) if module.is_none() => {
                file.is_some_and(|file| file.contains("/lib/python") || file.starts_with('<'))
            }
            _ => is_of_namespace(name) || is_of_c(name),
        });
        // Code that was made at run time, and of which nothing is known.
        let is_nameless = function.is_none() && module.is_none();
        match is_runtime_file || is_runtime_function || is_nameless {
            true => Origin::Runtime,
            false => Origin::Own,
        }
    }
}

/// A library in a directory for libraries of every program. Modules of a program lie in directories of their own, mostly below these.
fn is_of_system(module: &str) -> bool {
    let Some((directory, base)) = module.rsplit_once('/') else {
        return false;
    };
    let directory = directory.strip_prefix("/usr").unwrap_or(directory);
    let in_libraries = match directory.strip_prefix("/lib") {
        Some("" | "64") => true,
        // /lib/x86_64-linux-gnu
        Some(rest) => rest.starts_with('/') && rest.ends_with("-linux-gnu"),
        None => false,
    };
    in_libraries && base.contains(".so")
}

/// The name of an interpreter, perhaps with a version at its end.
fn is_interpreter(base: &str) -> bool {
    let name = base.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.');
    INTERPRETERS.contains(&name) || INTERPRETERS.contains(&base)
}

/// `net/http.(*conn).serve`: the package is the path up to the last dot before the function.
fn is_of_go(name: &str) -> bool {
    let first = name.split(['/', '.']).next().unwrap_or(name);
    GO_PACKAGES.contains(&first)
}

fn is_of_c(name: &str) -> bool {
    name.starts_with("__") || C_FUNCTIONS.contains(&name)
}

/// Also a method of a type or trait of theirs, `<std::net::tcp::TcpStream as std::io::Read>::read`, and a template, whose name begins with the type of
/// its result: `unsigned long boost::asio::read<...>(...)`.
fn is_of_namespace(name: &str) -> bool {
    let name = without_result(name).trim_start_matches(['<', '&', '*']);
    NAMESPACES.iter().any(|start| name.starts_with(start))
}

/// The name behind the last blank that is outside of brackets, and before the parameters.
fn without_result(name: &str) -> &str {
    let mut depth = 0_usize;
    let mut start = 0;
    for (at, letter) in name.char_indices() {
        match letter {
            // `(anonymous namespace)` is a part of a name.
            '(' if depth == 0 && !name[at..].starts_with("(anonymous") => break,
            '<' | '(' | '{' | '[' => depth += 1,
            '>' | ')' | '}' | ']' => depth = depth.saturating_sub(1),
            // `operator bool` is a part of a name, too.
            ' ' if depth == 0 && !name[..at].ends_with("operator") => start = at + 1,
            _ => {}
        }
    }
    &name[start..]
}

/// `void java.net.Socket.close()`, `java.net.Socket::close`, and names of stubs such as `Interpreter`, which have no package.
fn is_of_java(name: &str) -> bool {
    let method = name.split('(').next().unwrap_or(name);
    let qualified = method.rsplit(' ').next().unwrap_or(method);
    let is_package = |package: &&str| {
        let rest = qualified.strip_prefix(*package);
        rest.is_some_and(|rest| rest.starts_with('.'))
    };
    let has_class = qualified.contains("::") || qualified.contains('.');
    !has_class || JAVA_PACKAGES.iter().any(is_package)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(function: &str, module: &str, runtime: Option<Runtime>) -> Origin {
        Origin::of(Some(function), None, Some(module), runtime)
    }

    #[test]
    fn the_c_library_is_not_the_programs_own() {
        let module = "/usr/lib/x86_64-linux-gnu/libc.so.6";
        assert_eq!(origin("read", module, None), Origin::Runtime);
        assert_eq!(origin("leaky_handler", "/srv/app", None), Origin::Own);
        let ssl = "/usr/lib/x86_64-linux-gnu/libssl.so.3";
        assert_eq!(origin("SSL_read", ssl, None), Origin::Runtime);
        let module = "/usr/lib/redis/modules/leak.so";
        assert_eq!(origin("leak_command", module, None), Origin::Own);
        // Linked statically.
        assert_eq!(origin("__libc_recv", "/srv/app", None), Origin::Runtime);
        assert_eq!(origin("read_to_end", "/srv/app", None), Origin::Own);
    }

    #[test]
    fn libraries_of_languages_are_not_the_programs_own() {
        let go = Some(Runtime::Go);
        for (name, module, runtime) in [
            ("net.(*conn).Read", "/srv/app", go),
            ("internal/poll.(*FD).Read", "/srv/app", go),
            ("net/http.(*conn).serve", "/srv/app", go),
            ("runtime.goexit", "/srv/app", go),
            (
                "<std::net::tcp::TcpStream as std::io::Read>::read",
                "/srv/app",
                None,
            ),
            (
                "<&std::net::tcp::TcpStream as std::io::Read>::read",
                "/srv/app",
                None,
            ),
            (
                "unsigned long boost::asio::read<shop::Socket, char>(shop::Socket&)",
                "/srv/app",
                None,
            ),
            (
                "void std::__invoke_impl<void, shop::Server>(shop::Server&&)",
                "/srv/app",
                None,
            ),
            ("_PyEval_EvalFrameDefault", "/usr/bin/python3.11", None),
            (
                "sock_recv",
                "/usr/lib/python3.11/lib-dynload/_socket.cpython-311-x86_64-linux-gnu.so",
                None,
            ),
        ] {
            assert_eq!(origin(name, module, runtime), Origin::Runtime, "{name}");
        }
        for (name, runtime) in [
            ("main.leakyHandler", go),
            ("github.com/shop/web.(*Server).drain", go),
            ("<web::Handler as web::Service>::call", None),
            ("standard_handler", None),
            ("std::string shop::read<std::string>(std::istream&)", None),
            ("shop::(anonymous namespace)::serve(std::vector<int>)", None),
            ("shop::Lines::operator()(std::string const&) const", None),
            ("shop::Lines::operator std::string() const", None),
        ] {
            assert_eq!(origin(name, "/srv/app", runtime), Origin::Own, "{name}");
        }
    }

    #[test]
    fn methods_of_java_are_told_by_their_package() {
        let java = Some(Runtime::Java);
        let origin = |name: &str| Origin::of(Some(name), None, None, java);
        assert_eq!(
            origin("int java.net.SocketInputStream.read()"),
            Origin::Runtime
        );
        assert_eq!(origin("sun.nio.ch.NioSocketImpl::read"), Origin::Runtime);
        assert_eq!(origin("Interpreter"), Origin::Runtime);
        assert_eq!(
            origin("void Leak.leakyHandler(java.net.Socket)"),
            Origin::Own
        );
        assert_eq!(origin("javaserver.Leak::run"), Origin::Own);
    }

    #[test]
    fn functions_of_python_are_told_by_their_file() {
        let python = Some(Runtime::Python(3, 12));
        let of = |file| Origin::of(Some("recv"), Some(file), None, python);
        assert_eq!(of("/usr/lib/python3.12/socket.py"), Origin::Runtime);
        assert_eq!(of("/srv/app.py"), Origin::Own);
    }
}
