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

use crate::device::Payload;

/// Bytes that Rust owns, seen through the read-only buffer protocol.
#[pyclass(frozen, module = "dualrestore._core")]
pub struct ByteBuffer {
    bytes: Held,
}

enum Held {
    Own(Vec<u8>),
    Shared(Payload),
}

impl ByteBuffer {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes: Held::Own(bytes) }
    }

    /// Shares the memory.
    pub fn of_payload(bytes: Payload) -> Self {
        Self { bytes: Held::Shared(bytes) }
    }

    fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Held::Own(bytes) => bytes,
            Held::Shared(bytes) => bytes,
        }
    }
}

#[pymethods]
impl ByteBuffer {
    fn __len__(&self) -> usize {
        self.bytes().len()
    }

    // SAFETY: called by the interpreter only, with a view to fill.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        // SAFETY: the bytes never move or change, since the class is frozen and they are lent
        // immutably only, and they live as long as the object.
        unsafe { show(slf.get().bytes(), slf.as_any(), view, flags) }
    }

    // SAFETY: called by the interpreter only, with a view that `__getbuffer__` filled; nothing to
    // release.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {}
}

/// A verified chunk of a bundle, and where in the volume it lies.
#[pyclass(frozen, module = "dualrestore._core")]
pub struct BundleChunk {
    #[pyo3(get)]
    offset: u64,
    bytes: Payload,
}

impl BundleChunk {
    pub fn new(offset: u64, bytes: Payload) -> Self {
        Self { offset, bytes }
    }
}

#[pymethods]
impl BundleChunk {
    fn __len__(&self) -> usize {
        self.bytes.len()
    }

    fn __repr__(&self) -> String {
        format!("BundleChunk(offset={}, length={})", self.offset, self.bytes.len())
    }

    // SAFETY: called by the interpreter only, with a view to fill.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        // SAFETY: as those of a `ByteBuffer`.
        unsafe { show(&slf.get().bytes, slf.as_any(), view, flags) }
    }

    // SAFETY: as that of a `ByteBuffer`.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {}
}

/// Fills a view of bytes, read-only.
///
/// # Safety
///
/// `view` is null or may be filled; the bytes stay as they are, where they are, as long as `owner`.
// SAFETY: the callers keep what is said above.
unsafe fn show(
    bytes: &[u8],
    owner: &Bound<'_, PyAny>,
    view: *mut ffi::Py_buffer,
    flags: c_int,
) -> PyResult<()> {
    if view.is_null() {
        return Err(PyBufferError::new_err("no view to fill"));
    }
    let start = bytes.as_ptr().cast_mut().cast();
    let length = isize::try_from(bytes.len()).expect("memory is at most isize::MAX long");
    // SAFETY: `view` is not null; the view gets a reference to the owner of the bytes. Read-only.
    let filled = unsafe { ffi::PyBuffer_FillInfo(view, owner.as_ptr(), start, length, 1, flags) };
    if filled == 0 { Ok(()) } else { Err(PyErr::fetch(owner.py())) }
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
