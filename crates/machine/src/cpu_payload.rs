//! The processor's payload: the engine's own encoding of its state.
use crate::payload::{Payload, Payloads, RestoreError};
use twinstep_x86::{CpuState, STATE_VERSION, decode_state, encode_state};

const KIND: &str = "cpu";

pub(crate) fn save(state: &CpuState) -> Payload {
    Payload { kind: KIND.into(), version: STATE_VERSION, bytes: encode_state(state) }
}

pub(crate) fn restore(payloads: &mut Payloads) -> Result<CpuState, RestoreError> {
    let payload = payloads.take(KIND, STATE_VERSION)?;
    decode_state(&payload.bytes).map_err(|e| payload.invalid(e.to_string()))
}
