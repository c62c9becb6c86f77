//! Bytes and descriptors across the boundary. One of the three files that may use `unsafe`.
//!
//! Guarantees: bytes of Rust are seen by Python read-only, alive as long as a view of them is;
//! bytes of Python are copied while its buffer is held, never seen as a Rust slice.

#![expect(unsafe_code, reason = "the buffer protocol and descriptors are C interfaces")]

use std::ffi::c_int;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;

/// Bytes that Rust owns, seen through the read-only buffer protocol.
#[pyclass(frozen, module = "dualrestore._core")]
pub struct ByteBuffer {
    bytes: Vec<u8>,
}

impl ByteBuffer {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes }
    }
}

#[pymethods]
impl ByteBuffer {
    fn __len__(&self) -> usize {
        self.bytes.len()
    }

    // SAFETY: called by the interpreter only, with a view to fill.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        if view.is_null() {
            return Err(PyBufferError::new_err("no view to fill"));
        }
        let bytes = &slf.get().bytes;
        let start = bytes.as_ptr().cast_mut().cast();
        let length = isize::try_from(bytes.len()).expect("a vector is at most isize::MAX long");
        // SAFETY: `view` is not null; the bytes never move or change, since the class is frozen,
        // and live as long as the object, to which the view gets a reference. Read-only.
        let filled = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), start, length, 1, flags) };
        if filled == 0 { Ok(()) } else { Err(PyErr::fetch(slf.py())) }
    }

    // SAFETY: called by the interpreter only, with a view that `__getbuffer__` filled; nothing to
    // release.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {}
}

/// A copy of the first `length` bytes of a contiguous Python buffer.
pub fn copy_from_python(buffer: &Bound<'_, PyAny>, length: usize) -> PyResult<Vec<u8>> {
    let held: PyBuffer<u8> = PyBuffer::get(buffer)?;
    if !held.is_c_contiguous() || length > held.len_bytes() {
        return Err(PyBufferError::new_err(format!(
            "expected a contiguous buffer of at least {length} bytes, found {}",
            held.len_bytes()
        )));
    }
    let mut copy = vec![0; length];
    // SAFETY: `held` keeps the memory alive and of this length; the ranges do not overlap, as
    // `copy` was made just now.
    unsafe {
        std::ptr::copy_nonoverlapping(held.buf_ptr().cast::<u8>(), copy.as_mut_ptr(), length);
    }
    Ok(copy)
}

/// A copy of a descriptor that Python keeps.
pub fn copy_descriptor(descriptor: RawFd) -> PyResult<OwnedFd> {
    if descriptor < 0 {
        return Err(PyBufferError::new_err(format!("{descriptor} is no descriptor")));
    }
    // SAFETY: borrowed for this call only; one that is not open makes the copy fail.
    let borrowed = unsafe { BorrowedFd::borrow_raw(descriptor) };
    Ok(borrowed.try_clone_to_owned()?)
}

/// Takes a descriptor that Python gave away (`socket.detach()`).
pub fn take_descriptor(descriptor: RawFd) -> PyResult<OwnedFd> {
    if descriptor < 0 {
        return Err(PyBufferError::new_err(format!("{descriptor} is no descriptor")));
    }
    // SAFETY: the caller's contract is that the descriptor is open and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
