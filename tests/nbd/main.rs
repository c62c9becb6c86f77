//! The NBD room seen from outside: the session as bytes, the server on sockets, real clients.

mod client;
mod clients;
mod extended;
mod handshake;
mod ram_service;
mod robustness;
mod server;
mod session_driver;
mod transmission;
mod wire;
