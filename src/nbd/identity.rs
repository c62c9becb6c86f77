//! Who a client is, by its certificate, and whom an export is for.
//!
//! Guarantees: nothing here decides whether a certificate is genuine; that is done before.
//! Does not know: TLS, exports.

use std::net::IpAddr;

use ring::digest::{SHA256, digest};
use x509_cert::Certificate;
use x509_cert::der::Decode;
use x509_cert::der::asn1::{PrintableStringRef, TeletexStringRef, Utf8StringRef};
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

use crate::error::{Error, Result};
use crate::limits::NBD_ALLOWED_BYTES_MAX;

const FINGERPRINT_BYTES: usize = 32;
const PREFIX: &str = "sha256:";

/// One client that may use an export, or several with a name in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// The common name of the subject, or one of its alternative names: of a host, an address, a
    /// mailbox, or a URI.
    Name(String),
    /// SHA-256 of the whole certificate.
    Fingerprint([u8; FINGERPRINT_BYTES]),
}

impl Allowed {
    /// `sha256:` and 64 hexadecimal digits, with or without colons between them, or a name.
    pub fn parse(text: &str) -> Result<Self> {
        if text.is_empty() || text.len() > NBD_ALLOWED_BYTES_MAX || text.contains('\0') {
            return Err(Error::usage(format!(
                "expected a name of a certificate or sha256: and its fingerprint, found {text:?}"
            )));
        }
        let Some(digits) = text.strip_prefix(PREFIX) else { return Ok(Self::Name(name(text))) };
        fingerprint(digits).map(Self::Fingerprint).ok_or_else(|| {
            Error::usage(format!(
                "expected 64 hexadecimal digits after {PREFIX}, found {digits:?}: openssl x509 \
                 -noout -fingerprint -sha256 -in client-cert.pem prints them"
            ))
        })
    }
}

fn fingerprint(digits: &str) -> Option<[u8; FINGERPRINT_BYTES]> {
    let digits: Vec<u8> = digits.bytes().filter(|digit| *digit != b':').collect();
    let (pairs, rest) = digits.as_chunks::<2>();
    let byte = |pair: &[u8; 2]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    let bytes: Option<Vec<u8>> = pairs.iter().map(byte).collect();
    if rest.is_empty() { bytes?.try_into().ok() } else { None }
}

/// As names are compared: letters of any case are the same, addresses are written in one way.
fn name(text: &str) -> String {
    text.parse::<IpAddr>().map_or_else(|_| text.to_lowercase(), |address| address.to_string())
}

/// What a client's certificate says of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientIdentity {
    names: Vec<String>,
    fingerprint: [u8; FINGERPRINT_BYTES],
}

impl ClientIdentity {
    /// `certificate` is DER, and genuine. One that cannot be read has no names.
    #[must_use]
    pub fn of(certificate: &[u8]) -> Self {
        let mut fingerprint = [0; FINGERPRINT_BYTES];
        fingerprint.copy_from_slice(digest(&SHA256, certificate).as_ref());
        let names = Certificate::from_der(certificate).map_or_else(|_| Vec::new(), |it| names(&it));
        Self { names, fingerprint }
    }

    #[must_use]
    pub fn is_among(&self, allowed: &[Allowed]) -> bool {
        allowed.iter().any(|one| match one {
            Allowed::Name(name) => self.names.contains(name),
            Allowed::Fingerprint(fingerprint) => *fingerprint == self.fingerprint,
        })
    }
}

fn names(certificate: &Certificate) -> Vec<String> {
    let tbs = certificate.tbs_certificate();
    let mut names: Vec<String> = common_names(certificate);
    if let Ok(Some((_critical, alternatives))) = tbs.get_extension::<SubjectAltName>() {
        names.extend(alternatives.0.iter().filter_map(alternative));
    }
    names
}

fn common_names(certificate: &Certificate) -> Vec<String> {
    const COMMON_NAME: &str = "2.5.4.3";
    let subject = certificate.tbs_certificate().subject();
    let attributes = subject.iter_rdn().flat_map(|rdn| rdn.iter());
    attributes
        .filter(|attribute| attribute.oid.to_string() == COMMON_NAME)
        .filter_map(|attribute| {
            let value = &attribute.value;
            let text = value.decode_as::<Utf8StringRef<'_>>().map(|text| text.as_str().to_owned());
            let text = text.or_else(|_| {
                value.decode_as::<PrintableStringRef<'_>>().map(|text| text.as_str().to_owned())
            });
            let text = text.or_else(|_| {
                value.decode_as::<TeletexStringRef<'_>>().map(|text| text.as_str().to_owned())
            });
            text.ok().map(|text| name(&text))
        })
        .collect()
}

fn alternative(general: &GeneralName) -> Option<String> {
    match general {
        GeneralName::DnsName(text)
        | GeneralName::Rfc822Name(text)
        | GeneralName::UniformResourceIdentifier(text) => Some(name(text.as_str())),
        GeneralName::IpAddress(bytes) => {
            let bytes = bytes.as_bytes();
            let four = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
            let address = four.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from));
            address.ok().map(|address| address.to_string())
        }
        _ => None,
    }
}
