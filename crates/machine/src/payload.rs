//! Saved state: one numbered, versioned payload per device, kept beside the device that owns it.
//!
//! **In/out:** plain bytes (CBOR with numbered fields, RFC 8949). **Invariant:** a payload that is unknown, missing, given twice, newer than this
//! build, longer than what was read, or that holds values no machine can hold is an error that names the payload. Never a panic: payloads
//! come from files and from the network.
use std::collections::BTreeMap;

/// The state of one device (or of one other part of the machine).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payload {
    /// Which device: `"serial"`, `"virtio-net0"`, ...
    pub kind: String,
    /// Format of `bytes`; grows when a field is added that older builds must not ignore.
    pub version: u16,
    /// Numbered fields.
    pub bytes: Vec<u8>,
}

/// Why a saved state was refused. The machine must not be used after it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// Nothing in this machine takes such a payload (another configuration, or a newer build).
    #[error("payload '{kind}' belongs to no device of this machine")]
    Unknown {
        /// The payload.
        kind: String,
    },
    /// A device found no payload of its own.
    #[error("payload '{kind}' is missing")]
    Missing {
        /// The payload.
        kind: String,
    },
    /// The same payload came twice.
    #[error("payload '{kind}' is there twice")]
    Twice {
        /// The payload.
        kind: String,
    },
    /// Written by a newer build.
    #[error("payload '{kind}' has version {version}; this build knows versions up to {known}")]
    Newer {
        /// The payload.
        kind: String,
        /// Its version.
        version: u16,
        /// The newest version this build reads.
        known: u16,
    },
    /// The bytes are not what that payload looks like, or hold a state no machine can be in.
    #[error("payload '{kind}' is damaged: {why}")]
    Invalid {
        /// The payload.
        kind: String,
        /// What is wrong.
        why: String,
    },
}

impl Payload {
    /// Encodes `state`.
    pub(crate) fn encode<T: minicbor::Encode<()>>(kind: impl Into<String>, version: u16, state: &T) -> Self {
        let mut bytes = Vec::new();
        // Writing to a Vec cannot fail; should it ever, the payload is short and its restore says so.
        let written = minicbor::encode(state, &mut bytes);
        debug_assert!(written.is_ok());
        Self { kind: kind.into(), version, bytes }
    }

    /// Decodes the whole of it.
    pub(crate) fn decode<'b, T: minicbor::Decode<'b, ()>>(&'b self) -> Result<T, RestoreError> {
        self.decode_part(&self.bytes)
    }

    /// Decodes the whole of `bytes`, which lay inside this payload.
    pub(crate) fn decode_part<'b, T: minicbor::Decode<'b, ()>>(&self, bytes: &'b [u8]) -> Result<T, RestoreError> {
        let mut decoder = minicbor::Decoder::new(bytes);
        let value = decoder.decode().map_err(|e| self.invalid(e.to_string()))?;
        if decoder.position() != bytes.len() {
            return Err(self.invalid("bytes are left over at its end"));
        }
        Ok(value)
    }

    /// An error about this payload.
    pub(crate) fn invalid(&self, why: impl Into<String>) -> RestoreError {
        RestoreError::Invalid { kind: self.kind.clone(), why: why.into() }
    }
}

/// The payloads of one saved state while devices pick theirs.
#[derive(Debug)]
pub(crate) struct Payloads(BTreeMap<String, Payload>);

impl Payloads {
    pub(crate) fn new(payloads: Vec<Payload>) -> Result<Self, RestoreError> {
        let mut map = BTreeMap::new();
        for payload in payloads {
            if map.contains_key(&payload.kind) {
                return Err(RestoreError::Twice { kind: payload.kind });
            }
            map.insert(payload.kind.clone(), payload);
        }
        Ok(Self(map))
    }

    /// Takes the payload `kind`, of version `known` or older.
    pub(crate) fn take(&mut self, kind: &str, known: u16) -> Result<Payload, RestoreError> {
        let payload = self.0.remove(kind).ok_or_else(|| RestoreError::Missing { kind: kind.into() })?;
        if payload.version > known {
            return Err(RestoreError::Newer { kind: payload.kind, version: payload.version, known });
        }
        if payload.version == 0 {
            return Err(payload.invalid("there is no version 0"));
        }
        Ok(payload)
    }

    /// All payloads must have been taken.
    pub(crate) fn finish(mut self) -> Result<(), RestoreError> {
        match self.0.pop_first() {
            Some((kind, _)) => Err(RestoreError::Unknown { kind }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mismatch_is_named() {
        let p = Payload::encode("a", 2, &7u32);
        assert_eq!(p.decode::<u32>(), Ok(7));
        assert!(matches!(p.decode::<String>(), Err(RestoreError::Invalid { .. })));
        let mut long = p.clone();
        long.bytes.push(0);
        assert!(matches!(long.decode::<u32>(), Err(RestoreError::Invalid { .. })));

        let mut all = Payloads::new(vec![p.clone()]).unwrap();
        assert_eq!(all.take("b", 2), Err(RestoreError::Missing { kind: "b".into() }));
        assert_eq!(all.take("a", 1), Err(RestoreError::Newer { kind: "a".into(), version: 2, known: 1 }));
        let all = Payloads::new(vec![p.clone()]).unwrap();
        assert_eq!(all.finish(), Err(RestoreError::Unknown { kind: "a".into() }));
        assert_eq!(Payloads::new(vec![p.clone(), p]).unwrap_err(), RestoreError::Twice { kind: "a".into() });
    }
}
