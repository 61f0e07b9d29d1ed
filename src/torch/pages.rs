//! Huge pages for memory that is read in scattered places.

use tch::{Device, Tensor};

/// Bytes from which huge pages are requested: the TLB covers fewer with small pages.
#[cfg(target_os = "linux")]
const LARGE: usize = 1 << 24;
#[cfg(target_os = "linux")]
const PAGE: usize = 1 << 12;

/// Asks the system to back `tensor`, contiguous and not written yet, with huge pages if it is large
/// and in host memory. Whether the system does affects only speed.
pub fn ask_for_large(tensor: &Tensor) {
    #[cfg(target_os = "linux")]
    if tensor.device() == Device::Cpu {
        let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
        let start = tensor.data_ptr().cast::<u8>();
        let offset = start.align_offset(PAGE);
        if bytes >= LARGE && offset < bytes {
            let len = (bytes - offset) / PAGE * PAGE;
            // SAFETY: whole pages inside the tensor's memory, and advice that leaves contents as they are.
            unsafe {
                libc::madvise(start.wrapping_add(offset).cast(), len, libc::MADV_HUGEPAGE);
            }
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (tensor, Device::Cpu);
}
