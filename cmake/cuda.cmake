# libfastee_cuda: the CUDA kernels behind their C ABI, a library of its own that Python loads when a device is asked for. nvcc links its
# runtime statically; the driver is found at run time, so the library loads (and says what is missing) on a machine without one.
file(GLOB FASTEE_CUDA_KERNELS CONFIGURE_DEPENDS csrc/cuda/*.cu)
set(FASTEE_CUDA_SOURCES ${FASTEE_CUDA_KERNELS} csrc/core/status.cc csrc/core/head_args.cc csrc/core/pack_args.cc)

set(FASTEE_CUDA "AUTO" CACHE STRING "libfastee_cuda: ON, OFF, or AUTO: when nvcc and an NVIDIA device are there")
set(FASTEE_CUDA_ARCHITECTURES "" CACHE STRING "for example 90 or 80;90;100; empty: this machine's GPU, or 80;90;100 where there is none")
find_program(FASTEE_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
if(FASTEE_CUDA STREQUAL "ON" OR (FASTEE_CUDA STREQUAL "AUTO" AND FASTEE_NVCC AND EXISTS /dev/nvidiactl))
  set(CMAKE_CUDA_COMPILER ${FASTEE_NVCC})
  if(FASTEE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES ${FASTEE_CUDA_ARCHITECTURES})
  elseif(EXISTS /dev/nvidiactl AND CMAKE_VERSION VERSION_GREATER_EQUAL 3.24)
    set(CMAKE_CUDA_ARCHITECTURES native)
  else()
    set(CMAKE_CUDA_ARCHITECTURES 80 90 100)
  endif()
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  enable_language(CUDA)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")  # CMake 3.25 does not know that nvcc 13 has it
  add_library(fastee_cuda SHARED ${FASTEE_CUDA_SOURCES})
  target_include_directories(fastee_cuda PRIVATE csrc csrc/include)
  target_compile_definitions(fastee_cuda PRIVATE FASTEE_HOME=kDLCUDA FASTEE_CUDA_BUILDING)
  # What the kernels do not write as fused stays apart, as on the CPU: equal bits (csrc/cuda/device.cuh).
  target_compile_options(fastee_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-fmad=false$<SEMICOLON>--extended-lambda>
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -ffp-contract=off>)
  target_link_options(fastee_cuda PRIVATE -Wl,--exclude-libs,ALL)
  set_target_properties(fastee_cuda PROPERTIES
    LIBRARY_OUTPUT_DIRECTORY "${PROJECT_SOURCE_DIR}/fastee"
    CUDA_STANDARD 20 CUDA_EXTENSIONS OFF CUDA_VISIBILITY_PRESET hidden)
  install(TARGETS fastee_cuda LIBRARY DESTINATION fastee)
endif()

# The CUDA kernels and their launchers without a device: the same sources against a host's stand-in for CUDA's language and runtime. Its
# threads are fibers, which the thread sanitizer does not follow and which are slow under qemu.
if(FASTEE_TESTS AND NOT CMAKE_CROSSCOMPILING AND NOT FASTEE_SANITIZE MATCHES "thread")
  file(GLOB FASTEE_CUDA_TESTS CONFIGURE_DEPENDS csrc/tests/cuda/test_*.cc)
  add_library(fastee_cuda_emulated STATIC ${FASTEE_CUDA_SOURCES})
  set_source_files_properties(${FASTEE_CUDA_KERNELS} TARGET_DIRECTORY fastee_cuda_emulated PROPERTIES LANGUAGE CXX UNITY_GROUP cuda)
  fastee_units(fastee_cuda_emulated)
  target_include_directories(fastee_cuda_emulated BEFORE PUBLIC csrc/tests/cuda)
  target_link_libraries(fastee_cuda_emulated PRIVATE fastee_flags)
  target_compile_definitions(fastee_cuda_emulated PRIVATE FASTEE_HOME=kDLCUDA FASTEE_CUDA_BUILDING)
  target_compile_options(fastee_cuda_emulated PRIVATE -O1 -Wno-unknown-pragmas)
  # The same as a library for Python: tests/ops run the ops' bodies through it (tests/compile/test_cuda_emulated.py).
  if(FASTEE_PYTHON)
    add_library(fastee_cuda_python MODULE $<TARGET_OBJECTS:fastee_cuda_emulated>)
    set_target_properties(fastee_cuda_python PROPERTIES OUTPUT_NAME fastee_cuda_emulated)
    target_link_libraries(fastee_cuda_python PRIVATE fastee_flags)
  endif()
  foreach(source IN LISTS FASTEE_CUDA_TESTS)
    get_filename_component(name ${source} NAME_WE)
    add_executable(${name} ${source})
    target_link_libraries(${name} PRIVATE fastee fastee_cuda_emulated fastee_flags)
    target_compile_options(${name} PRIVATE -O1)
    add_test(NAME ${name} COMMAND ${name})
  endforeach()
endif()
