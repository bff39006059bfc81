// Loading of images from memory, and the way from an instruction back to its source line.
#include "module.h"

#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cinttypes>
#include <cstdio>
#include <cstring>

#include "image.h"

namespace {

// Copies memory into the file. The kernel does the reading: where the caller's image ends too early for what its header
// promises, that is an error here, not a fault of this process.
bool append(int descriptor, const void* data, size_t bytes) {
  const char* from = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = write(descriptor, from, bytes);
    if (written <= 0) return false;
    from += written;
    bytes -= static_cast<size_t>(written);
  }
  return true;
}

// The length of a shared object: its section headers are the last thing in it.
bool object_length(const Elf64_Ehdr& header, size_t* bytes) {
  const size_t LARGEST = size_t(1) << 30;
  if (header.e_type != ET_DYN || header.e_shentsize != sizeof(Elf64_Shdr) || header.e_shoff > LARGEST) return false;
  *bytes = header.e_shoff + size_t(header.e_shentsize) * header.e_shnum;
  return true;
}

// Whether the file holds the object and trailer whose length is given, undamaged.
bool verify(int descriptor, size_t bytes, int* architecture) {
  const size_t whole = bytes + sizeof(ImageTrailer);
  void* mapped = mmap(nullptr, whole, PROT_READ, MAP_PRIVATE, descriptor, 0);
  if (mapped == MAP_FAILED) return false;
  ImageTrailer trailer;
  memcpy(&trailer, static_cast<const char*>(mapped) + bytes, sizeof trailer);
  *architecture = int(trailer.architecture);
  const bool whole_image = memcmp(trailer.magic, IMAGE_MAGIC, sizeof IMAGE_MAGIC) == 0 && trailer.bytes == bytes &&
                           trailer.hash == hash_image(trailer.architecture, mapped, bytes);
  munmap(mapped, whole);
  return whole_image;
}

struct Extent {
  const char* path;
  uintptr_t begin, end;
};

int find_extent(dl_phdr_info* info, size_t, void* data) {
  Extent* extent = static_cast<Extent*>(data);
  if (!info->dlpi_name || strcmp(info->dlpi_name, extent->path) != 0) return 0;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const ElfW(Phdr) & segment = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
    // What can be written to is no constant: kernels have no business there.
    if (segment.p_type != PT_LOAD || (segment.p_flags & PF_W)) continue;
    if (extent->end == 0 || begin < extent->begin) extent->begin = begin;
    if (begin + segment.p_memsz > extent->end) extent->end = begin + segment.p_memsz;
  }
  return 1;
}

}  // namespace

CUresult Image::load(const void* data, int compute_capability, std::unique_ptr<Image>* image) {
  if (!data) return CUDA_ERROR_INVALID_VALUE;
  // Read no further than what was read so far allows: a short text is an image that a caller may pass.
  const char* text = static_cast<const char*>(data);
  if (strncmp(text, PTX_MAGIC, sizeof PTX_MAGIC - 1) == 0) return CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
  if (strncmp(text, ELFMAG, SELFMAG) != 0) return CUDA_ERROR_INVALID_IMAGE;

  const int descriptor = memfd_create("cubin", MFD_CLOEXEC);
  if (descriptor < 0) return CUDA_ERROR_OPERATING_SYSTEM;
  Elf64_Ehdr header;
  size_t bytes = 0;
  int compiled_for = 0;
  const bool sound = append(descriptor, data, sizeof header) &&
                     pread(descriptor, &header, sizeof header, 0) == static_cast<ssize_t>(sizeof header) &&
                     object_length(header, &bytes) && bytes > sizeof header &&
                     append(descriptor, text + sizeof header, bytes + sizeof(ImageTrailer) - sizeof header) &&
                     verify(descriptor, bytes, &compiled_for);
  if (!sound) {
    close(descriptor);
    return CUDA_ERROR_INVALID_IMAGE;
  }

  // A path of its own: the descriptor stays open as long as the library is loaded.
  char path[64];
  snprintf(path, sizeof path, "/proc/self/fd/%d", descriptor);
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    fprintf(stderr, "stand-in driver: %s\n", dlerror());
    close(descriptor);
    return CUDA_ERROR_INVALID_IMAGE;
  }
  std::unique_ptr<Image> loaded(new Image(descriptor, library));
  // A cubin runs on its own major version, from its own minor version on.
  if (compiled_for / 10 != compute_capability / 10 || compiled_for > compute_capability) {
    return CUDA_ERROR_NO_BINARY_FOR_GPU;
  }
  Extent extent = {path, 0, 0};
  dl_iterate_phdr(find_extent, &extent);
  loaded->begin_ = extent.begin;
  loaded->size_ = extent.end - extent.begin;
  *image = std::move(loaded);
  return CUDA_SUCCESS;
}

Image::~Image() {
  dlclose(library_);
  close(descriptor_);
}

const StandInKernel* Image::kernel(const char* name) const {
  return static_cast<const StandInKernel*>(dlsym(library_, (std::string("stand_in_kernel_") + name).c_str()));
}

std::string Image::line_of_offset(uintptr_t offset) const {
  offset--;  // the byte before a return address belongs to the call
  if (offset >= size_) return "";
  char command[128];
  snprintf(command, sizeof command, "addr2line -s -e /proc/%d/fd/%d 0x%" PRIxPTR " 2>/dev/null", getpid(), descriptor_,
           offset);
  FILE* output = popen(command, "r");
  if (!output) return "";
  char line[512] = "";
  if (!fgets(line, sizeof line, output)) line[0] = 0;
  pclose(output);
  std::string text(line);
  text.resize(text.find_first_of(" \n") == std::string::npos ? text.size() : text.find_first_of(" \n"));
  return text.compare(0, 2, "??") == 0 ? "" : text;
}
