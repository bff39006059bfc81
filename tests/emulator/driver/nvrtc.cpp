// The stand-in NVRTC: hands the very source and options it got to the C++ compiler of the host.
//
// A "cubin" is the shared object that comes back, with a trailer (image.h). Shared objects are kept in a directory
// under a key of what the preprocessor made of the source: kernels that differ in definitions that only a GPU's
// compiler looks at are compiled once. Beside them, under a key of source and options, lies the name of the object that
// belongs to them, so that nothing is preprocessed twice either, whatever number of processes ask for it.
#include <fcntl.h>
#include <spawn.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "image.h"

extern char** environ;

// The driver's, where it is loaded: see faults.cpp.
extern "C" __attribute__((weak)) unsigned stand_in_next_fault(const char* call);

#define MAY_FAIL()                                                                              \
  do {                                                                                          \
    const unsigned fault = stand_in_next_fault ? stand_in_next_fault(__func__) : NVRTC_SUCCESS; \
    if (fault) return nvrtcResult(fault);                                                       \
  } while (0)

namespace {

enum nvrtcResult {
  NVRTC_SUCCESS = 0,
  NVRTC_ERROR_OUT_OF_MEMORY = 1,
  NVRTC_ERROR_PROGRAM_CREATION_FAILURE = 2,
  NVRTC_ERROR_INVALID_INPUT = 3,
  NVRTC_ERROR_INVALID_PROGRAM = 4,
  NVRTC_ERROR_INVALID_OPTION = 5,
  NVRTC_ERROR_COMPILATION = 6,
  NVRTC_ERROR_INTERNAL_ERROR = 11,
};

const int ARCHITECTURES[] = {75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121};

struct Program {
  std::string source;
  std::string name;
  std::string log;
  std::string cubin;
  std::string ptx;
};

struct Configuration {
  std::string cache;    // where images are kept
  std::string include;  // where stand_in_device.h lies
  std::atomic<int> major{13};
  std::atomic<int> minor{0};
};

Configuration configuration;

// Changes that the calling thread makes to the sources it gives, to see whether its tests notice.
struct Patch {
  std::string find, replace;
};
thread_local std::vector<Patch> patches;
thread_local size_t patches_applied = 0;

std::string patched(std::string source) {
  for (const Patch& patch : patches) {
    for (size_t at = 0; (at = source.find(patch.find, at)) != std::string::npos; at += patch.replace.size()) {
      source.replace(at, patch.find.size(), patch.replace);
      patches_applied++;
    }
  }
  return source;
}

// Programs that exist, so that a wrong handle is an error.
std::mutex programs_mutex;
std::set<Program*> programs;

Program* find_program(void* handle) {
  std::lock_guard<std::mutex> lock(programs_mutex);
  auto found = programs.find(static_cast<Program*>(handle));
  return found == programs.end() ? nullptr : *found;
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

bool write_file(const std::string& path, const std::string& content) {
  std::ofstream file(path, std::ios::binary);
  file.write(content.data(), std::streamsize(content.size()));
  return bool(file.flush());
}

std::vector<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  return std::vector<std::string>(std::istream_iterator<std::string>(stream), std::istream_iterator<std::string>());
}

// Runs a command; what it says on either output goes to the log file. True if it succeeded.
bool run(const std::vector<std::string>& command, const std::string& log) {
  std::vector<char*> arguments;
  for (const std::string& word : command) arguments.push_back(const_cast<char*>(word.c_str()));
  arguments.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
  posix_spawn_file_actions_adddup2(&actions, STDOUT_FILENO, STDERR_FILENO);
  pid_t child;
  const int error = posix_spawnp(&child, arguments[0], &actions, nullptr, arguments.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (error) {
    std::ofstream(log, std::ios::app) << "cannot run " << command[0] << ": " << strerror(error) << "\n";
    return false;
  }
  int status;
  while (waitpid(child, &status, 0) < 0) {
    if (errno != EINTR) return false;
  }
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// A name in the cache directory that no other thread or process uses.
std::string scratch_name() {
  static std::atomic<unsigned> serial{0};
  return configuration.cache + "/scratch-" + std::to_string(getpid()) + "-" + std::to_string(serial++);
}

// Files that are gone when the compilation is over.
class ScratchFiles {
 public:
  ScratchFiles() : stem_(scratch_name()) {}
  ~ScratchFiles() {
    for (const std::string& path : paths_) unlink(path.c_str());
  }
  std::string path(const char* suffix) {
    paths_.push_back(stem_ + suffix);
    return paths_.back();
  }

 private:
  std::string stem_;
  std::vector<std::string> paths_;
};

struct Compiler {
  std::vector<std::string> command;
  std::string identity;  // what it says about its version
  bool clang;
};

const Compiler& compiler() {
  static const Compiler found = [] {
    Compiler made;
    const char* chosen = getenv("CXX");
    made.command = words(chosen && *chosen ? chosen : "c++");
    ScratchFiles scratch;
    const std::string log = scratch.path(".version");
    std::vector<std::string> ask = made.command;
    ask.push_back("--version");
    run(ask, log);
    made.identity = read_file(log);
    made.clang = made.identity.find("clang") != std::string::npos;
    return made;
  }();
  return found;
}

// ---- options -------------------------------------------------------------------------------------------------------

struct Options {
  std::vector<std::string> for_host;  // definitions and include paths, in order
  int architecture = 75;              // what NVRTC compiles for when nobody says
  bool real_architecture = false;     // sm_XX rather than compute_XX: yields a cubin
};

bool starts_with(const std::string& text, const char* prefix) { return text.compare(0, strlen(prefix), prefix) == 0; }

// Takes the value of "--name=value", "--name value", "-nvalue", whichever the option list uses.
bool take_value(const std::vector<std::string>& list, size_t& i, const char* name, bool glued, std::string* value) {
  const std::string& option = list[i];
  if (option == name) {
    if (i + 1 == list.size()) return false;
    *value = list[++i];
    return true;
  }
  if (!starts_with(option, name)) return false;
  const std::string rest = option.substr(strlen(name));
  if (rest[0] == '=') {
    *value = rest.substr(1);
  } else if (glued) {
    *value = rest;
  } else {
    return false;
  }
  return true;
}

// What concerns a GPU's code only, and what asks for the arithmetic that the stand-in has anyway.
bool means_nothing_here(const std::string& option) {
  static const char* const EXACT[] = {"--fmad=false",         "-fmad=false",
                                      "-default-device",      "--device-as-default-execution-space",
                                      "--std=c++17",          "-std=c++17",
                                      "--prec-div=true",      "--prec-sqrt=true",
                                      "--ftz=false",          "-prec-div=true",
                                      "-prec-sqrt=true",      "-ftz=false",
                                      "--restrict",           "-restrict",
                                      "--generate-line-info", "-lineinfo",
                                      "--device-debug",       "-G",
                                      "--disable-warnings",   "-w"};
  static const char* const PREFIXES[] = {"--maxrregcount=",
                                         "-maxrregcount=",
                                         "--diag-suppress=",
                                         "-diag-suppress=",
                                         "--ptxas-options=",
                                         "-Xptxas=",
                                         "--extra-device-vectorization"};
  return std::any_of(std::begin(EXACT), std::end(EXACT), [&](const char* known) { return option == known; }) ||
         std::any_of(std::begin(PREFIXES), std::end(PREFIXES),
                     [&](const char* known) { return starts_with(option, known); });
}

bool read_architecture(const std::string& value, Options* options) {
  options->real_architecture = starts_with(value, "sm_");
  if (!options->real_architecture && !starts_with(value, "compute_")) return false;
  options->architecture = atoi(value.c_str() + value.find('_') + 1);
  return std::find(std::begin(ARCHITECTURES), std::end(ARCHITECTURES), options->architecture) !=
         std::end(ARCHITECTURES);
}

// False where NVRTC would refuse, or where the stand-in could not keep what the option promises (fast mathematics).
bool read_options(const std::vector<std::string>& list, Options* options, std::string* log) {
  for (size_t i = 0; i < list.size(); i++) {
    std::string value;
    if (take_value(list, i, "--gpu-architecture", false, &value) || take_value(list, i, "-arch", false, &value)) {
      if (read_architecture(value, options)) continue;
      *log += "nvrtc: error: invalid value for --gpu-architecture (-arch)\n";
      return false;
    }
    if (take_value(list, i, "--define-macro", false, &value) || take_value(list, i, "-D", true, &value)) {
      options->for_host.push_back("-D" + value);
    } else if (take_value(list, i, "--undefine-macro", false, &value) || take_value(list, i, "-U", true, &value)) {
      options->for_host.push_back("-U" + value);
    } else if (take_value(list, i, "--include-path", false, &value) || take_value(list, i, "-I", true, &value)) {
      options->for_host.push_back("-I" + value);
    } else if (!means_nothing_here(list[i])) {
      *log += "nvrtc: error: unrecognized option " + list[i] + " found\n";
      return false;
    }
  }
  return true;
}

// ---- compilation ---------------------------------------------------------------------------------------------------

std::vector<std::string> compile_command(const Options& options) {
  std::vector<std::string> command = compiler().command;
  // Every access is instrumented; the driver supplies what the instrumentation calls. Contraction stays off, so that
  // fma_rn is the only fused multiply-add, as with --fmad=false on a GPU. Debugging information is for line numbers; in
  // its fifth version, addr2line of binutils 2.40 takes file names for each other. Stacks have 64 KiB. Kernels are
  // compiled more often than they run for long, so the compiler takes the way that is short for it. The working
  // directory would be in the preprocessed text, and the same kernel another one in another directory.
  for (const char* flag :
       {"-x", "c++", "-std=c++17", "-c", "-Og", "-g1", "-gdwarf-4", "-Werror=frame-larger-than=32768", "-fPIC",
        "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-strict-aliasing", "-ffp-contract=off",
        "-fsanitize=thread", "-fno-working-directory", "-pipe"}) {
    command.push_back(flag);
  }
  if (compiler().clang) {
    command.insert(command.end(), {"-mllvm", "-tsan-instrument-func-entry-exit=0"});
  } else {
    // Small structs in registers, or each access to them would be instrumented; less code for functions with one
    // caller; and no search for where variables live, which takes a quarter of the time and nobody looks at.
    command.insert(command.end(), {"--param=tsan-instrument-func-entry-exit=0", "-fno-gnu-unique", "-ftree-sra",
                                   "-finline-functions-called-once", "-fno-var-tracking",
                                   "-fno-var-tracking-assignments", "-gno-statement-frontiers"});
  }
#if defined(__x86_64__)
  // Without it each fma_rn is a call into the C library.
  if (__builtin_cpu_supports("fma")) command.push_back("-mfma");
#endif
  command.insert(command.end(), {"-DBATCHNORM_STAND_IN", "-I" + configuration.include});
  command.insert(command.end(), options.for_host.begin(), options.for_host.end());
  return command;
}

// What the compiler gets: the source under the name that its author gave it.
std::string unit_of(const Program& program) {
  std::string name;
  for (const char c : program.name) {
    if (c == '"' || c == '\\') name += '\\';
    name += c;
  }
  return "#line 1 \"" + name + "\"\n" + program.source;
}

// Two hashes from different beginnings: 128 bits, so that no two texts share a key.
std::string key_of(const std::string& everything) {
  char key[40];
  snprintf(key, sizeof key, "%016llx%016llx",
           static_cast<unsigned long long>(hash_bytes(everything.data(), everything.size())),
           static_cast<unsigned long long>(hash_bytes(everything.data(), everything.size(), 0x9e3779b97f4a7c15u)));
  return key;
}

// The key of a source with its options.
std::string key_of(const std::vector<std::string>& command, const std::string& unit) {
  std::string everything = compiler().identity;
  for (const std::string& word : command) everything += '\0' + word;
  for (const char* header : {"/stand_in_abi.h", "/stand_in_device.h"})
    everything += '\0' + read_file(configuration.include + header);
  return key_of(everything + '\0' + unit);
}

// Readers see the whole file or none.
bool write_whole(const std::string& path, const std::string& scratch, const std::string& content) {
  return write_file(scratch, content) && rename(scratch.c_str(), path.c_str()) == 0;
}

// Lets one thread at a time compile a source; the others find it in the cache afterwards.
class InProgress {
 public:
  explicit InProgress(const std::string& key) : key_(key) {
    std::unique_lock<std::mutex> lock(mutex());
    changed().wait(lock, [&] { return keys().count(key_) == 0; });
    keys().insert(key_);
  }
  ~InProgress() {
    std::lock_guard<std::mutex> lock(mutex());
    keys().erase(key_);
    changed().notify_all();
  }

 private:
  static std::mutex& mutex() {
    static std::mutex only;
    return only;
  }
  static std::condition_variable& changed() {
    static std::condition_variable only;
    return only;
  }
  static std::set<std::string>& keys() {
    static std::set<std::string> only;
    return only;
  }
  std::string key_;
};

// Runs a command of the compiler; its complaints become the log.
bool run_compiler(const Program& program, const std::vector<std::string>& command, ScratchFiles& scratch,
                  std::string* log) {
  const std::string messages = scratch.path(".log");
  if (run(command, messages)) return true;
  *log = read_file(messages);
  if (log->empty()) *log = "nvrtc: error: the compiler failed on " + program.name + "\n";
  return false;
}

// Whether an option has done its work when a source is preprocessed.
bool for_preprocessor(const std::string& option) {
  return starts_with(option, "-D") || starts_with(option, "-U") || starts_with(option, "-I");
}

// Compiles what is not in the cache. The name of the object there, or nothing and a log.
//
// Warnings are another compiler's, about a GPU's pragmas: not what NVRTC would say.
std::string compile(const Program& program, const std::vector<std::string>& command, const std::string& unit,
                    std::string* log) {
  ScratchFiles scratch;
  const std::string source = scratch.path(".cpp"), preprocessed = scratch.path(".ii"), object = scratch.path(".o");
  const std::string library = scratch.path(".so"), finished = scratch.path(".object");
  if (!write_file(source, unit)) {
    *log = "nvrtc: error: cannot write to " + configuration.cache + "\n";
    return "";
  }
  std::vector<std::string> preprocess = command;
  preprocess.insert(preprocess.end(), {"-E", "-o", preprocessed, source});
  if (!run_compiler(program, preprocess, scratch, log)) return "";
  std::string text = read_file(preprocessed);
  // The scratch file's name is another one every time.
  for (size_t at = 0; (at = text.find(source, at)) != std::string::npos;) text.replace(at, source.size(), "source");
  std::vector<std::string> make;
  std::copy_if(command.begin(), command.end(), std::back_inserter(make),
               [](const std::string& word) { return !for_preprocessor(word); });
  std::vector<std::string> link = compiler().command;
  make.insert(make.end(), {"-x", "c++-cpp-output"});
  link.insert(link.end(), {"-shared", "-nostdlib"});
  std::string everything = compiler().identity + '\0' + text;
  for (const std::vector<std::string>& step : {make, link}) {
    for (const std::string& word : step) everything += '\0' + word;
  }
  const std::string name = key_of(everything) + ".object";
  const std::string path = configuration.cache + "/" + name;
  const InProgress only_one(name);
  if (!read_file(path).empty()) return name;
  make.insert(make.end(), {"-o", object, preprocessed});
  link.insert(link.end(), {"-o", library, object});
  if (!run_compiler(program, make, scratch, log) || !run_compiler(program, link, scratch, log)) return "";
  const std::string linked = read_file(library);
  if (linked.empty() || !write_whole(path, finished, linked)) {
    *log = "nvrtc: error: cannot write to " + configuration.cache + "\n";
    return "";
  }
  return name;
}

// A shared object as a cubin for an architecture.
std::string cubin_of(std::string object, int architecture) {
  ImageTrailer trailer;
  memcpy(trailer.magic, IMAGE_MAGIC, sizeof trailer.magic);
  trailer.architecture = uint64_t(architecture);
  trailer.bytes = object.size();
  trailer.hash = hash_image(trailer.architecture, object.data(), object.size());
  return object.append(reinterpret_cast<const char*>(&trailer), sizeof trailer);
}

void copy_out(const std::string& text, char* into) { memcpy(into, text.data(), text.size()); }

}  // namespace

extern "C" {

void stand_in_nvrtc_configure(const char* cache, const char* include) {
  configuration.cache = cache;
  configuration.include = include;
  mkdir(cache, 0777);
}

void stand_in_add_patch(const char* find, const char* replace) { patches.push_back({find, replace}); }

// Ends the patches of the calling thread; how often one of them was applied.
size_t stand_in_clear_patches() {
  patches.clear();
  return std::exchange(patches_applied, 0);
}

void stand_in_set_nvrtc_version(int major, int minor) {
  configuration.major = major;
  configuration.minor = minor;
}

const char* nvrtcGetErrorString(nvrtcResult result) {
  switch (result) {
    case NVRTC_SUCCESS:
      return "NVRTC_SUCCESS";
    case NVRTC_ERROR_OUT_OF_MEMORY:
      return "NVRTC_ERROR_OUT_OF_MEMORY";
    case NVRTC_ERROR_PROGRAM_CREATION_FAILURE:
      return "NVRTC_ERROR_PROGRAM_CREATION_FAILURE";
    case NVRTC_ERROR_INVALID_INPUT:
      return "NVRTC_ERROR_INVALID_INPUT";
    case NVRTC_ERROR_INVALID_PROGRAM:
      return "NVRTC_ERROR_INVALID_PROGRAM";
    case NVRTC_ERROR_INVALID_OPTION:
      return "NVRTC_ERROR_INVALID_OPTION";
    case NVRTC_ERROR_COMPILATION:
      return "NVRTC_ERROR_COMPILATION";
    case NVRTC_ERROR_INTERNAL_ERROR:
      return "NVRTC_ERROR_INTERNAL_ERROR";
  }
  return "NVRTC_ERROR unknown";
}

nvrtcResult nvrtcVersion(int* major, int* minor) {
  if (!major || !minor) return NVRTC_ERROR_INVALID_INPUT;
  *major = configuration.major;
  *minor = configuration.minor;
  return NVRTC_SUCCESS;
}

nvrtcResult nvrtcGetNumSupportedArchs(int* number) {
  MAY_FAIL();
  if (!number) return NVRTC_ERROR_INVALID_INPUT;
  *number = int(std::end(ARCHITECTURES) - std::begin(ARCHITECTURES));
  return NVRTC_SUCCESS;
}

nvrtcResult nvrtcGetSupportedArchs(int* architectures) {
  MAY_FAIL();
  if (!architectures) return NVRTC_ERROR_INVALID_INPUT;
  std::copy(std::begin(ARCHITECTURES), std::end(ARCHITECTURES), architectures);
  return NVRTC_SUCCESS;
}

nvrtcResult nvrtcCreateProgram(void** handle, const char* source, const char* name, int header_count,
                               const char* const*, const char* const*) {
  MAY_FAIL();
  if (!handle || !source || header_count < 0) return NVRTC_ERROR_INVALID_INPUT;
  // Sources come flattened: there is nothing to include.
  if (header_count > 0) return NVRTC_ERROR_PROGRAM_CREATION_FAILURE;
  Program* program = new Program{patched(source), name && *name ? name : "default_program", {}, {}, {}};
  std::lock_guard<std::mutex> lock(programs_mutex);
  programs.insert(program);
  *handle = program;
  return NVRTC_SUCCESS;
}

nvrtcResult nvrtcDestroyProgram(void** handle) {
  MAY_FAIL();
  if (!handle) return NVRTC_ERROR_INVALID_PROGRAM;
  std::lock_guard<std::mutex> lock(programs_mutex);
  auto found = programs.find(static_cast<Program*>(*handle));
  if (found == programs.end()) return NVRTC_ERROR_INVALID_PROGRAM;
  delete *found;
  programs.erase(found);
  return NVRTC_SUCCESS;
}

nvrtcResult nvrtcCompileProgram(void* handle, int option_count, const char* const* option_list) {
  MAY_FAIL();
  Program* program = find_program(handle);
  if (!program) return NVRTC_ERROR_INVALID_PROGRAM;
  if (option_count < 0 || (option_count > 0 && !option_list)) return NVRTC_ERROR_INVALID_INPUT;
  program->log.clear();
  program->cubin.clear();
  program->ptx.clear();
  Options options;
  if (!read_options(std::vector<std::string>(option_list, option_list + option_count), &options, &program->log)) {
    return NVRTC_ERROR_INVALID_OPTION;
  }
  const std::vector<std::string> command = compile_command(options);
  const std::string unit = unit_of(*program);
  const std::string key = key_of(command, unit);
  const std::string path = configuration.cache + "/" + key + ".name";
  std::string object;
  {
    const InProgress only_one(key);
    const std::string name = read_file(path);
    if (!name.empty()) object = read_file(configuration.cache + "/" + name);
    if (object.empty()) {
      const std::string compiled = compile(*program, command, unit, &program->log);
      if (compiled.empty()) return NVRTC_ERROR_COMPILATION;
      object = read_file(configuration.cache + "/" + compiled);
      ScratchFiles scratch;
      if (object.empty()) return NVRTC_ERROR_INTERNAL_ERROR;
      // Without it the source will be preprocessed again, and no more.
      write_whole(path, scratch.path(".name"), compiled);
    }
  }
  if (options.real_architecture) program->cubin = cubin_of(std::move(object), options.architecture);
  program->ptx = std::string(PTX_MAGIC) + ".version 9.0\n.target sm_" + std::to_string(options.architecture) + "\n";
  return NVRTC_SUCCESS;
}

// Texts are handed out with the zero at their end, images without.
nvrtcResult nvrtcGetPTXSize(void* handle, size_t* bytes) {
  MAY_FAIL();
  Program* program = find_program(handle);
  if (!program) return NVRTC_ERROR_INVALID_PROGRAM;
  *bytes = program->ptx.size() + 1;
  return NVRTC_SUCCESS;
}
nvrtcResult nvrtcGetPTX(void* handle, char* ptx) {
  MAY_FAIL();
  Program* program = find_program(handle);
  if (!program) return NVRTC_ERROR_INVALID_PROGRAM;
  copy_out(program->ptx + '\0', ptx);
  return NVRTC_SUCCESS;
}
nvrtcResult nvrtcGetCUBINSize(void* handle, size_t* bytes) {
  MAY_FAIL();
  Program* program = find_program(handle);
  if (!program) return NVRTC_ERROR_INVALID_PROGRAM;
  *bytes = program->cubin.size();
  return NVRTC_SUCCESS;
}
nvrtcResult nvrtcGetCUBIN(void* handle, char* cubin) {
  MAY_FAIL();
  Program* program = find_program(handle);
  if (!program) return NVRTC_ERROR_INVALID_PROGRAM;
  copy_out(program->cubin, cubin);
  return NVRTC_SUCCESS;
}
nvrtcResult nvrtcGetProgramLogSize(void* handle, size_t* bytes) {
  MAY_FAIL();
  Program* program = find_program(handle);
  if (!program) return NVRTC_ERROR_INVALID_PROGRAM;
  *bytes = program->log.size() + 1;
  return NVRTC_SUCCESS;
}
nvrtcResult nvrtcGetProgramLog(void* handle, char* log) {
  MAY_FAIL();
  Program* program = find_program(handle);
  if (!program) return NVRTC_ERROR_INVALID_PROGRAM;
  copy_out(program->log + '\0', log);
  return NVRTC_SUCCESS;
}
}
