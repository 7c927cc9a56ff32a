#include "scratch.h"

namespace elsa {

void* scratch_bytes(Scratch which, std::size_t bytes) {
    struct Piece {
        Buffer memory;
        std::size_t size = 0;
    };
    thread_local Piece pieces[static_cast<int>(Scratch::count)];
    Piece& piece = pieces[static_cast<int>(which)];
    if (piece.size < bytes) {
        piece.size = 0;
        piece.memory.reset();  // before the new one: the contents are not kept
        piece.memory = allocate(bytes + bytes / 4);
        piece.size = bytes + bytes / 4;
    }
    return piece.memory.get();
}

}  // namespace elsa
