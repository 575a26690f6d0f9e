//! Closes TCP sockets stuck in CLOSE-WAIT without killing the process that leaks them.
